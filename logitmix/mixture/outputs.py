"""What a mixture's forward pass returns."""

from dataclasses import dataclass
from typing import NoReturn

from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class MixtureOutput(CausalLMOutputWithPast):
    """The output of a causal language model, which names the way out where code reads the states under one head."""

    @property
    def last_hidden_state(self) -> NoReturn:
        """Raises `AttributeError`: no single state and head give the mixture's logits."""
        raise AttributeError(
            "a mixture has no last_hidden_state that one output head maps to its logits: use a trainer that reads "
            "logits (TRL's GKDTrainer with a mixture as the teacher), or logitmix's own (LogitMixGRPOTrainer, "
            "MixtureDistillationTrainer)"
        )
