"""FlowHN and its rivals at equal size, measured and trained alike in one command."""
