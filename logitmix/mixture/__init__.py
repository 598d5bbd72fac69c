"""What a mixture is, and how it is built, run, sampled, saved and exported."""
