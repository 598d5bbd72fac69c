"""logitmix: a policy and its frozen anchors, mixed in the logits, as one causal language model."""
