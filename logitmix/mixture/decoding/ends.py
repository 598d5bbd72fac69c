"""Where each completion of a batch ends, reported while others continue."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, StoppingCriteria, StopStringCriteria


class CompletionEnds(StoppingCriteria):
    """Ends sequences at stop strings, and reports each completion as soon as it ends at one or at EOS.

    After its end `generate` pads a sequence, with a token that may also be sampled, so afterwards it cannot be told.

    Args:
        prompt_length: of the batch, with padding.
        eos_token_ids: at which other criteria of `generate` end a sequence.
        stop: the stop strings, if there are any.
        report: called with the index of a sequence and the ids of its completion. One that reaches the limit of new
            tokens is reported only by decoding with a cache for each member (`logitmix.mixture.decoding.loop`).
    """

    def __init__(
        self,
        prompt_length: int,
        eos_token_ids: Sequence[int],
        stop: StopStringCriteria | None,
        report: Callable[[int, list[int]], None],
    ) -> None:
        self.stop, self.report = stop, report
        self._eos = EosTokenCriteria(list(eos_token_ids))
        self._prompt_length = prompt_length
        self._reported: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        eos_B: Tensor = self._eos(input_ids, scores)
        stopped_B = torch.zeros_like(eos_B) if self.stop is None else self.stop(input_ids, scores)
        for i in (eos_B | stopped_B).nonzero().flatten().tolist():
            if i not in self._reported:  # otherwise it has been padded since
                self._reported.add(i)
                self.report(i, input_ids[i, self._prompt_length :].tolist())
        return stopped_B
