"""Ahead-of-time (AOT) compilation of train steps for absent hardware: memory and communication."""
