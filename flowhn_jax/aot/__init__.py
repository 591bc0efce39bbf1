"""Train steps compiled for machines that are not here: what they need, and what they send."""
