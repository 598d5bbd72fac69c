"""What a run leaves on disk: its folder, its files, its provenance, and what it shows while it runs."""
