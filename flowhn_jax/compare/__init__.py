"""FlowHN and its baselines of equal size, measured and trained under equal conditions."""
