"""The anchor's weight over a run: fixed, scheduled or set by validation."""
