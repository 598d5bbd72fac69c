"""How lm-evaluation-harness scores a mixture of which members read prompts of their own.

Its `HFLM` gives a model the context and the continuation in one row, which does not say where the prompt ends that
such a member does not read. So it is scored in rows that do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.scoring import continuation_logits

_hflm_log_likelihoods: Callable[..., list[tuple[float, bool]]] = HFLM._loglikelihood_tokens
_hflm_detect_batch_size: Callable[..., int] = HFLM._detect_batch_size

Request = tuple[Any, list[int], list[int]]  # the texts, by which results are cached; the context; the continuation


def score_with_member_prompts() -> None:
    """Let `HFLM` score mixtures with saved prompts; other models are scored as before.

    Replaces `HFLM._loglikelihood_tokens`, which all of its log-likelihoods come from, and `HFLM._detect_batch_size`,
    whose trial passes know no context either.
    """
    HFLM._loglikelihood_tokens = _log_likelihoods
    HFLM._detect_batch_size = _detect_batch_size


def _log_likelihoods(
    self: HFLM, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
) -> list[tuple[float, bool]]:
    """Of each continuation, the log-probability, and whether it is the greedy one."""
    if not _has_member_prompts(self):
        return _hflm_log_likelihoods(self, requests, disable_tqdm, override_bs)
    batch_size = self.batch_size if isinstance(self.batch_size, int) else override_bs or self._detect_batch_size()
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
    hides = disable_tqdm or self.rank != 0
    with tqdm(total=len(requests), disable=hides, desc="Running loglikelihood requests") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found |= zip(batch, _score(self, [requests[i] for i in batch]), strict=True)
            bar.update(len(batch))
    for (texts, _, _), answer in zip(requests, (found[i] for i in range(len(requests))), strict=True):
        if texts is not None:  # None for a window of `loglikelihood_rolling`, which caches its sum itself
            self.cache_hook.add_partial("loglikelihood", texts, answer)
    return [found[i] for i in range(len(requests))]


def _score(self: HFLM, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    continuations = [ids for _, _, ids in requests]
    # as `HFLM` does: what is too long loses its first tokens, and the last one is not read
    contexts = [(start + end)[-(self.max_length + 1) :][: -len(end)] for _, start, end in requests]
    longest = max(map(len, continuations))
    for name, ids in self.model.config.member_prompts.items():
        room = self.max_length - len(ids) + 1
        if longest > room:
            raise ValueError(
                f"a continuation has {longest} tokens, but the prompt of {name} leaves {room} of the context of "
                f"{self.max_length}; pass max_length={room} in --model_args"
            )
    dtype = self.mixed_precision_dtype
    with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
        logits_BTV = continuation_logits(self.model, contexts, continuations)
    log_p_BTV = torch.log_softmax(logits_BTV, dim=-1, dtype=self.softmax_dtype)
    answers = []
    for log_p_TV, ids in zip(log_p_BTV, continuations, strict=True):
        target_T = torch.tensor(ids, device=log_p_TV.device)
        log_p_TV = log_p_TV[: len(ids)]
        total = log_p_TV.gather(1, target_T[:, None]).sum()
        answers.append((float(total), bool((log_p_TV.argmax(-1) == target_T).all())))
    return answers


def _detect_batch_size(self: HFLM, *args: Any, **kwargs: Any) -> int:
    if _has_member_prompts(self):
        raise ValueError("batch_size is auto, but a mixture with prompts of its members needs a number")
    return _hflm_detect_batch_size(self, *args, **kwargs)


def _has_member_prompts(self: HFLM) -> bool:
    return isinstance(self.model, MixtureBase) and bool(self.model.config.member_prompts)
