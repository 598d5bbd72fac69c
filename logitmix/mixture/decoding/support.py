"""The support that sampling with top-k, top-p or min-p keeps: which tokens could have been drawn at each position.

Shape legend: B sequences, T completion tokens, N tokens, n of a chunk, V vocabulary, M kept tokens of all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SequenceSupport = dict[str, Tensor]
"""Of one completion: `sizes` `[T]`, and `ids`, the kept tokens of each position in turn; both int32."""

_DEFAULT_TOP_K = 50  # of `generate`, when it samples
# With these settings `generate` draws from the scores as a processor leaves them
_UNCHANGED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}


@dataclass(frozen=True)
class Support:
    """The kept tokens of N positions: `sizes_N` of them at each, in the order of `ids_M`."""

    sizes_N: Tensor
    ids_M: Tensor

    @classmethod
    def of_scored(cls, supports: Sequence[SequenceSupport], scored_BT: Tensor) -> "Support":
        """The supports of the tokens at which `scored_BT` is true: those of whole completions, or none of one."""
        is_scored = scored_BT.any(1).tolist()
        parts = [support for support, scored in zip(supports, is_scored, strict=True) if scored]
        empty = torch.empty(0, dtype=torch.int32)
        sizes_N, ids_M = (
            torch.cat([empty.to(scored_BT.device), *(part[key].to(scored_BT.device) for part in parts)])
            for key in ("sizes", "ids")
        )
        assert len(sizes_N) == int(scored_BT.sum()), "a completion has one support a token"
        return cls(sizes_N, ids_M)

    def mask(self, tokens: slice, vocab_size: int) -> Tensor:
        """`[n, V]`: which tokens are kept at the positions `tokens`."""
        sizes_n = self.sizes_N[tokens].long()
        start, count = int(self.sizes_N[: tokens.start].sum()), int(sizes_n.sum())
        mask_nV = torch.zeros(len(sizes_n), vocab_size, dtype=torch.bool, device=self.ids_M.device)
        rows_m = torch.repeat_interleave(torch.arange(len(sizes_n), device=mask_nV.device), sizes_n)
        mask_nV[rows_m, self.ids_M[start : start + count].long()] = True
        return mask_nV

    def mask_BTV(self, scored_BT: Tensor, vocab_size: int) -> Tensor:
        """`[B, T, V]`: the mask at the scored tokens, and true at others."""
        mask_BTV = torch.ones(*scored_BT.shape, vocab_size, dtype=torch.bool, device=scored_BT.device)
        mask_BTV[scored_BT] = self.mask(slice(0, len(self.sizes_N)), vocab_size)
        return mask_BTV


class SupportRecorder(LogitsProcessor):
    """Applies `generate`'s temperature, top-k, top-p and min-p in its place, and records which tokens are left.

    `generate` runs a caller's processors after its own limits (`min_new_tokens`, `suppress_tokens`) and before its
    own warpers, which `self.settings` turn off.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings | _UNCHANGED
        self._warpers = _truncation_warpers(settings)
        self._steps: list[tuple[Tensor, ...]] = []  # of each step, the kept tokens of each sequence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_BV: Tensor = self._warpers(input_ids, scores)
        rows_M, ids_M = (scores_BV > -torch.inf).nonzero(as_tuple=True)
        sizes = torch.bincount(rows_M, minlength=len(scores_BV)).tolist()
        self._steps.append(torch.split(ids_M.to(torch.int32), sizes))
        return scores_BV

    def supports(self, lengths: Sequence[int]) -> list[SequenceSupport]:
        """The supports of each sequence's first `lengths` tokens."""
        result = []
        for b, length in enumerate(lengths):
            kept = [step[b] for step in self._steps[:length]]
            sizes = torch.tensor([len(ids) for ids in kept], dtype=torch.int32, device=kept[0].device)
            result.append({"sizes": sizes, "ids": torch.cat(kept)})
        return result


def _truncation_warpers(settings: dict[str, Any]) -> LogitsProcessorList:
    """The warpers of `generate` for temperature, top-k, top-p and min-p, in its order."""
    temperature, top_k, top_p, min_p = (settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    top_k = _DEFAULT_TOP_K if top_k is None else top_k
    warpers = LogitsProcessorList()
    if temperature is not None and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k != 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers
