"""What every package may use: values, messages, files, memory and timing."""
