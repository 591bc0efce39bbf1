"""What every package may use: typed values, text of messages, files, locks, memory, timing."""
