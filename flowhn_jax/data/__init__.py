"""Data: text to token windows on disk (`prepare`), and from there to batches (`pipeline`)."""
