"""Runs over a grid of config keys, and the table of their results."""
