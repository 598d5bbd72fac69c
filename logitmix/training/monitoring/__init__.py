"""Metrics of each training step, and checks that its numbers are finite."""
