"""The workdir of a run: its state, checkpoints, config and lock."""
