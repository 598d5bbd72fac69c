"""The weights of a mixture that never train: stored once, and referred to by checkpoints."""
