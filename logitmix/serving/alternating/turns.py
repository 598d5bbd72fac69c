"""The turns of two members over the requests of a batch, on vLLM's first model runner: mixing, and drafting.

Shape legend: R rows of logits of a step, N requests, V vocabulary, K = 2 members.

A request has a row of logits after its last token, and one after its draft if it has one. The first is mixed with the
logits that the other member left there; then vLLM's rejection sampler verifies the draft, or draws a token if there is
no draft. A draft is drawn from its member's own distribution q, under the request's temperature, top-k and top-p.
Any q is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.sample.rejection_sampler import apply_sampling_constraints

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.decoding.speculation import make_finite
from logitmix.mixture.mixing import mix_logits


@dataclass
class Row:
    """A request in a step."""

    name: str
    position: int  # of its last token
    first: int  # the row of logits after it
    draft: int | None


@dataclass
class Reading:
    """What a member read of a request: its logits after the token at `position`, and the draft from them."""

    member: int
    position: int
    logits_V: Tensor
    draft: int
    probs_V: Tensor | None  # q; None if the draft is the most probable token


class MemberTurns:
    """The readings of the running requests. `model` is the mixture as a vLLM model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.readings: dict[str, Reading] = {}
        self.counts = DecodingStatistics()
        self.member: int | None = None
        self.rows: list[Row] = []
        self.own_RV = torch.empty(0)
        self.known: set[str] = set()  # requests that have the logits of both members after their last token

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Forget the readings of these requests, or all."""
        for name in list(self.readings if names is None else names):
            self.readings.pop(name, None)

    def reading(self, row: Row) -> Reading | None:
        """The reading of a request's last token, if there is one."""
        reading = self.readings.get(row.name)
        return reading if reading is not None and reading.position == row.position else None

    def mix(self, member: int | None, rows: Sequence[Row], logits_RV: Tensor) -> None:
        """Mix, in place, the logits of the `member` that ran with those of the other, where there are any.

        With `member` None they are the mixture's already.
        """
        self.member, self.rows = member, list(rows)
        self.known = {row.name for row in rows}
        if member is None:
            return
        self.own_RV = logits_RV.clone()
        pairs = [(row, reading) for row in rows if (reading := self.reading(row)) and reading.member != member]
        self.known = {row.name for row, _ in pairs}
        if pairs:
            index = torch.tensor([row.first for row, _ in pairs], device=logits_RV.device)
            logits_KNV = [logits_RV[index], torch.stack([reading.logits_V for _, reading in pairs])]
            config, by_request = self.model.config, self.model.engine.by_request
            weights_NK = [by_request.get(row.name) or config.weights for row, _ in pairs]
            in_order_KNV = logits_KNV if member == 0 else logits_KNV[::-1]
            mixed_NV = mix_logits(in_order_KNV, weights_NK, config.scheme, config.cut)
            logits_RV[index] = mixed_NV.to(logits_RV.dtype)

    def draft_probs(self, V: int) -> Tensor:
        """The distribution q of each draft in the step `[drafts, V]`; one-hot where it is the draft itself."""
        probs = torch.zeros(sum(row.draft is not None for row in self.rows), V, device=self.own_RV.device)
        drafted = [row for row in self.rows if row.draft is not None]
        for q_V, row in zip(probs, drafted, strict=True):
            reading = self.reading(row)
            if reading is not None and reading.draft == row.draft and reading.probs_V is not None:
                q_V.copy_(reading.probs_V)
            else:
                q_V[row.draft] = 1.0
        return probs

    def blank(self, tokens_NT: Tensor) -> Tensor:
        """The sampled tokens of a turn, `[N, 2]`: -1 where the mixture's logits were not known.

        These are the requests of which only one member has read the last token, and the tokens after a draft.
        """
        blanked_NT = torch.full((len(self.rows), 2), -1, dtype=tokens_NT.dtype, device=tokens_NT.device)
        is_known_N = torch.tensor([row.name in self.known for row in self.rows], device=tokens_NT.device)
        blanked_NT[:, 0] = torch.where(is_known_N, tokens_NT[:, 0], -1)
        return blanked_NT

    def draft(self, tokens: Sequence[Sequence[int]], metadata: SamplingMetadata) -> list[list[int]]:
        """Draft the next token of each request from the logits of the member that ran, where it has read the last.

        `tokens` are those that the step yielded. A request gets no draft if its last draft was rejected.
        """
        self._count(tokens)
        drafts: list[list[int]] = [[] for _ in self.rows]
        sources: list[tuple[int, int, int]] = []  # request, row of logits, position
        if self.member is not None:
            for n, (row, ids) in enumerate(zip(self.rows, tokens, strict=True)):
                if row.name not in self.known:
                    sources.append((n, row.first, row.position))
                elif row.draft is not None and ids[0] == row.draft:
                    sources.append((n, row.first + 1, row.position + 1))
        self.forget(row.name for row in self.rows)
        if not sources:
            return drafts
        logits_NV = self.own_RV[[row for _, row, _ in sources]]
        drawn_N, probs_NV = _draw(logits_NV, [n for n, _, _ in sources], metadata)
        for i, (n, _, position) in enumerate(sources):
            drafts[n] = [int(drawn_N[i])]
            probs_V = None if probs_NV is None else probs_NV[i]
            self.readings[self.rows[n].name] = Reading(self.member, position, logits_NV[i], drafts[n][0], probs_V)  # type: ignore[arg-type]
        return drafts

    def _count(self, tokens: Sequence[Sequence[int]]) -> None:
        counts = self.counts
        counts.tokens += sum(map(len, tokens))
        for member in (0, 1) if self.member is None else (self.member,):
            counts.passes[member] += len(self.rows)
        for row, ids in zip(self.rows, tokens, strict=True):
            reading = self.reading(row)
            if row.draft is not None and row.name in self.known and reading is not None and ids:
                counts.drafted[reading.member] += 1
                counts.accepted[reading.member] += ids[0] == row.draft

    def statistics(self) -> DecodingStatistics:
        """The counts since the start."""
        return self.counts


def _draw(logits_NV: Tensor, requests: list[int], metadata: SamplingMetadata) -> tuple[Tensor, Tensor | None]:
    """Tokens `[N]` of some requests of the batch, drawn from `logits_NV`, and their distributions `[N, V]`.

    `requests` are the rows of `metadata`. The distributions are None if all requests are greedy.
    """
    logits_NV = make_finite(logits_NV)
    most_probable_N = logits_NV.argmax(-1)
    if metadata.all_greedy or metadata.temperature is None:
        return most_probable_N, None
    counts = torch.zeros(len(metadata.temperature), dtype=torch.int32)
    counts[requests] = 1
    ends = counts.cumsum(0).to(device=logits_NV.device, dtype=torch.int32)
    probs_NV = apply_sampling_constraints(logits_NV.float().clone(), ends, metadata).softmax(-1)
    generators = {i: metadata.generators[n] for i, n in enumerate(requests) if n in metadata.generators}
    drawn_N = random_sample(probs_NV.clone(), generators)
    is_greedy_N = metadata.temperature[requests] == 0
    return torch.where(is_greedy_N, most_probable_N, drawn_N), probs_NV
