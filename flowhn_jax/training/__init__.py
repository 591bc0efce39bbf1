"""Training: the trainer, its step, metrics, validation and health."""
