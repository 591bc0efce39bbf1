"""Data: `prepare` writes text as token windows on disk; `pipeline` reads them back as batches."""
