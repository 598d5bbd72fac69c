"""A member that reads tokens into a KV cache of its own and takes the last ones back, for each sequence by itself.

Shape legend: B batch, C tokens read in one pass, K tokens whose logits are kept, T cached tokens, V vocabulary.

A sequence that takes tokens back moves its cached tokens to the right, so the free slots join the padding on its
left. All real tokens of a sequence are thus neighbours, as in any left-padded batch: sliding windows, chunked
attention and ALiBi, which count slots, stay right. A masked hole in the middle would make their distances too long.
"""

import inspect

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.padding import position_ids_from_mask
from logitmix.mixture.prefill import distinct_prompts
from logitmix.mixture.running import index_errors


class RewindableMember:
    """The member `name` of a mixture with a dynamic cache of whole keys and values, also in layers of sliding windows.

    Such a layer's own cache drops the token that leaves the window, which a token taken back would bring in again.

    Only for members without `unsupported_cache`.
    """

    def __init__(self, mixture: MixtureBase, name: str) -> None:
        self._mixture, self._name = mixture, name
        member = getattr(mixture, mixture.config.model_of(name))
        self._layers = [DynamicLayer() for _ in DynamicCache(config=member.config).layers]
        self._cache = Cache(layers=self._layers)
        self._mask_BT = torch.zeros(0, dtype=torch.long)

    @property
    def is_empty(self) -> bool:
        """Whether it has read nothing yet."""
        return self._mask_BT.numel() == 0

    def read(self, ids_BC: Tensor, mask_BC: Tensor, keep: int) -> Tensor:
        """Cache the tokens; return the logits `[B, keep, V]` after each of the last `keep`.

        `mask_BC` is 0 for padding, which only the first call may have, on the left.
        """
        prompts = distinct_prompts(ids_BC, mask_BC) if self.is_empty and min(ids_BC.shape) > 1 else None
        self._mask_BT = mask_BC if self.is_empty else torch.cat([self._mask_BT, mask_BC], dim=1)
        mask_BT = self._mask_BT
        if prompts is not None:
            ids_BC, mask_BT = prompts.select(ids_BC), prompts.select(mask_BT)
        with self._mixture.as_member(self._name) as member, index_errors(self._mixture.config, self._name):
            output = member(
                input_ids=ids_BC,
                attention_mask=mask_BT,
                position_ids=position_ids_from_mask(mask_BT)[:, -ids_BC.shape[1] :],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
                return_dict=True,
            )
        # again, because the forward of some members ignores logits_to_keep
        logits_BKV: Tensor = output.logits[:, -keep:, : self._mixture.config.vocab_size]
        if prompts is not None:
            self._cache.batch_select_indices(prompts.prompt_B)
            logits_BKV = prompts.expand(logits_BKV)
        return logits_BKV

    def take_back(self, counts_B: Tensor) -> None:
        """Forget the last `counts_B` tokens of each sequence."""
        counts = sorted(set(counts_B.tolist()))
        if counts == [0]:
            return
        if len(counts) == 1:
            self._slice(slice(None, self._mask_BT.shape[1] - counts[0]))
            return
        for count in counts:
            if count == 0:
                continue
            rows = (counts_B == count).nonzero().squeeze(1)
            for states in self._states():
                states[rows] = states[rows].roll(count, dims=-2)
            self._mask_BT[rows] = self._mask_BT[rows].roll(count, dims=1)
            self._mask_BT[rows, :count] = 0
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


def unsupported_cache(mixture: MixtureBase) -> str | None:
    """Why a member of `mixture` cannot have a cache that takes tokens back, if one cannot."""
    for name, member in zip(mixture.config.members, mixture.members, strict=True):
        layers = DynamicCache(config=member.config).layers
        if {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            return f"{name}, a {type(member).__name__}, whose cache holds more than the keys and values of attention"
        if "position_ids" not in inspect.signature(type(member).forward).parameters:  # RoFormer counts slots
            return f"{name}, a {type(member).__name__}, whose forward takes no position_ids"
    return None
