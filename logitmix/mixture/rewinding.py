"""A member that reads tokens into a KV cache of its own and takes the last one back, for each sequence by itself.

Shape legend: B batch, C tokens read in one pass, T cached tokens, V vocabulary.

A sequence that takes a token back moves its cached tokens one slot to the right, so the free slot joins the padding on
its left. All real tokens of a sequence are thus neighbours, as in any left-padded batch: sliding windows, chunked
attention and ALiBi, which count slots, stay right. A masked hole in the middle would make their distances too long.
"""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.padding import position_ids_from_mask


class RewindableMember:
    """The member `name` of a mixture with a dynamic cache of whole keys and values, also in layers of sliding windows.

    Such a layer's own cache drops the token that leaves the window, which a token taken back would bring in again.

    Raises `ValueError` for a member whose cache is not of attention alone, or whose positions are those of the slots.
    """

    def __init__(self, mixture: MixtureBase, name: str) -> None:
        self._mixture, self._name = mixture, name
        member = getattr(mixture, mixture.config.model_of(name))
        self._layers = [DynamicLayer() for _ in _validated_layers(name, member)]
        self._cache = Cache(layers=self._layers)
        self._mask_BT = torch.zeros(0, dtype=torch.long)

    def read(self, ids_BC: Tensor, mask_BC: Tensor) -> Tensor:
        """Cache the tokens; return the logits `[B, 2, V]` of the tokens after the last but one and after the last.

        `mask_BC` is 0 for padding, which only the first call may have, on the left.
        """
        self._mask_BT = mask_BC if self._mask_BT.numel() == 0 else torch.cat([self._mask_BT, mask_BC], dim=1)
        with self._mixture.as_member(self._name) as member:
            output = member(
                input_ids=ids_BC,
                attention_mask=self._mask_BT,
                position_ids=position_ids_from_mask(self._mask_BT)[:, -ids_BC.shape[1] :],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=2,
                return_dict=True,
            )
        logits_B2V: Tensor = output.logits[:, -2:, : self._mixture.config.vocab_size]
        return logits_B2V

    def take_back(self, sequences_B: Tensor) -> None:
        """Forget the last token of the sequences where `sequences_B` is True."""
        if sequences_B.all():
            self._slice(slice(None, -1))
        elif sequences_B.any():
            rows = sequences_B.nonzero().squeeze(1)
            for states in self._states():
                states[rows] = states[rows].roll(1, dims=-2)
            self._mask_BT[rows] = self._mask_BT[rows].roll(1, dims=1)
            self._mask_BT[rows, 0] = 0
            is_padding = self._mask_BT.cummax(dim=1).values.amax(0) == 0
            self._slice(slice(int(is_padding.sum()), None))

    def select(self, rows: Tensor) -> None:
        """Keep the sequences at the indices `rows` only."""
        self._cache.batch_select_indices(rows)
        self._mask_BT = self._mask_BT[rows]

    def _states(self) -> list[Tensor]:
        layers = [layer for layer in self._layers if layer.get_seq_length() > 0]  # a layer may share another's cache
        return [states for layer in layers for states in (layer.keys, layer.values) if states is not None]

    def _slice(self, slots: slice) -> None:
        for layer in self._layers:
            if layer.keys is not None and layer.values is not None and layer.get_seq_length() > 0:
                layer.keys, layer.values = layer.keys[..., slots, :], layer.values[..., slots, :]
        self._mask_BT = self._mask_BT[:, slots]


def _validated_layers(name: str, member: PreTrainedModel) -> list[object]:
    """The layers of the member's own cache. Raises `ValueError` for a member that cannot take a token back."""
    layers = list(DynamicCache(config=member.config).layers)
    reason = None
    if {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        reason = "its cache holds more than the keys and values of attention"
    elif "position_ids" not in inspect.signature(type(member).forward).parameters:  # RoFormer counts slots
        reason = "its forward takes no position_ids"
    if reason is not None:
        raise ValueError(
            f"{name}, a {type(member).__name__}, cannot take back a token that it has read, as alternating decoding "
            f"needs: {reason}; use joint decoding"
        )
    return layers
