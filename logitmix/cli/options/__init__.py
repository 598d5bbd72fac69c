"""Command-line flags as configuration objects."""
