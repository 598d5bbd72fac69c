"""A prompt that occurs several times in a batch, as for a group of rollouts, is read once by each member.

Shape legend: B sequences, R distinct prompts among them, T tokens of a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from logitmix.mixture.member_prompts import PassInputs


@dataclass(frozen=True)
class DistinctPrompts:
    """Sequence b of a batch has the prompt of the sequence `first_R[prompt_B[b]]`; those of `first_R` all differ."""

    first_R: Tensor
    prompt_B: Tensor

    def select_inputs(self, inputs: PassInputs) -> PassInputs:
        """The inputs of the distinct prompts."""
        mask, positions = inputs.attention_mask, inputs.position_ids
        return PassInputs(
            self.select(inputs.input_ids),
            None if mask is None else self.select(mask),
            None if positions is None else self.select(positions),
        )

    def select(self, states_BX: Tensor) -> Tensor:
        """The rows of the distinct prompts. A single row, which is for all of the batch, stays as it is."""
        return states_BX[self.first_R] if len(states_BX) == len(self.prompt_B) else states_BX

    def expand(self, states_RX: Tensor) -> Tensor:
        """The rows of all sequences, from those of the distinct prompts."""
        return states_RX[self.prompt_B.to(states_RX.device)]


def distinct_prompts(ids_BT: Tensor, *others_BT: Tensor | None) -> DistinctPrompts | None:
    """The prompts that differ in their ids or in one of the others, such as the mask; None if no two are equal."""
    B = len(ids_BT)
    keys = [ids_BT, *(each.expand(B, -1).to(ids_BT) for each in others_BT if each is not None)]
    rows, prompt_B = torch.unique(torch.cat(keys, dim=1), dim=0, return_inverse=True)
    if len(rows) == B:
        return None
    index_B = torch.arange(B, device=prompt_B.device)
    first_R = index_B.new_full((len(rows),), B).scatter_reduce(0, prompt_B, index_B, "amin")
    return DistinctPrompts(first_R, prompt_B)


def repeated_prefill(
    inputs: Sequence[PassInputs], cache: Cache | None, logits_to_keep: int | Tensor, arguments: Mapping[str, Any]
) -> DistinctPrompts | None:
    """The distinct prompts of a pass that fills an empty cache and keeps the last logits; None for any other pass.

    `inputs` are those of each member, of which members may share one. `arguments` are the others of the pass: it must
    have none, as they may ask for outputs of every row.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if cache is None or not isinstance(logits_to_keep, int) or logits_to_keep != 1 or cache.offloading:
        return None
    if {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer} or cache.get_seq_length():
        return None
    if any(value is not None and value is not False for value in arguments.values()):
        return None
    tensors = [tensor for each in {id(each): each for each in inputs}.values() for tensor in each.tensors()]
    if any(tensor.dim() != 2 for tensor in tensors) or min(inputs[0].input_ids.shape) < 2:
        return None
    return distinct_prompts(*tensors)
