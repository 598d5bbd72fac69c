"""Training on TRL: SFT of the anchor, GRPO of the mixture."""
