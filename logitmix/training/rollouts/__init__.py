"""Sampling of rollouts: dynamic sampling, and generation in vLLM."""
