"""What a run keeps: its state, checkpoints, config and lock."""
