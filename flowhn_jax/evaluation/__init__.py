"""Measuring trained models: quality and speed."""
