"""Recipes: configs/FILE.py:STRATEGY."""
