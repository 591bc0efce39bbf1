"""FlowHN and its baselines at equal size, measured and trained alike in one command."""
