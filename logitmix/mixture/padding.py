"""Left-padded batches: their ids, attention masks and position ids."""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[B, T]` of the sequences, padded on the left to the longest."""
    T = max(len(ids) for ids in sequences)
    ids = torch.tensor([[pad_token_id] * (T - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return ids, mask


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Position ids `[B, T]` that number the real tokens from 0, as `generate` does.

    Without them a member with absolute positions would count the padding on the left.
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
