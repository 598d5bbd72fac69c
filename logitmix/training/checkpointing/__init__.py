"""Checkpoints that are whole or absent, and exact resume."""
