"""Watches over a run: bad steps, requests to stop, and hangs."""
