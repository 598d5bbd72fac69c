"""Evaluation: greedy decodes of the members and the mixture on the same problems, and statistics of them."""
