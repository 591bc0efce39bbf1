"""FlowHN in JAX: attention and state-space branches that share the tokens."""
