"""What a mixture's forward pass returns."""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
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


def concatenate_outputs(outputs: list[Any], field: str) -> tuple[Tensor, ...] | None:
    """A field of the members' outputs, concatenated; None if a member lacks it."""
    fields = [getattr(output, field, None) for output in outputs]
    present = [values for values in fields if values is not None]
    return tuple(x for values in present for x in values) if len(present) == len(outputs) else None
