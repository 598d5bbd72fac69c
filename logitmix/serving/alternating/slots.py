"""The turns of two members over requests in slots, for vLLM's second model runner: nothing is read on the host.

Shape legend: N requests of a step, R rows of logits, S slots, V vocabulary, K = 2 members.

`turns.py` does the same for the first runner, which keeps its requests on the host. A request has a row of logits
after its last token, and one after its draft if it has one. The first is mixed with the logits that the other member
left in the request's slot; then vLLM's sampler verifies the draft, or draws a token if there is no draft. A draft is
drawn from its member's own distribution q, those same logits under the request's temperature. Any q is exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.decoding.speculation import make_finite

NONE = -1
Mix = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass
class Step:
    """The requests of a step of decoding."""

    slots_N: Tensor
    first_N: Tensor  # the row of logits after the last token
    position_N: Tensor  # of the last token
    draft_N: Tensor  # NONE without a draft


class SlotTurns:
    """What members left of the request in each slot: logits after a token, from which they drew its draft.

    `mix([z_NV, z_NV], slots_N)` is the mixture of the members' logits at the weights of the requests in these slots.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, mix: Mix) -> None:
        self.mix_logits = mix
        self.logits_SV = torch.zeros(num_slots, vocab_size, device=device)
        # who left logits that are still to be mixed, and after which token
        self.member_S = torch.full((num_slots,), NONE, device=device)
        self.position_S = torch.full((num_slots,), NONE, device=device)
        self.member: int | None = None
        self.is_counted = True  # not in vLLM's warm-up
        self.step: Step | None = None
        self.own_RV = torch.empty(0)
        self.known_N = self.accepted_N = torch.empty(0)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.passes_K, self.drafted_K, self.accepted_K = torch.zeros(3, 2, dtype=torch.int64, device=device)

    def forget(self, slots: Sequence[int] | None = None) -> None:
        """Forget the logits in these slots, or in all. The draft from them remains, and so does its q."""
        self.member_S[slice(None) if slots is None else list(slots)] = NONE

    def mix(self, member: int | None, step: Step, logits_RV: Tensor) -> Tensor:
        """The logits `[R, V]` to sample from: those of `member` mixed with the other's.

        With `member` None both members ran, and `logits_RV` are the mixture's already.
        """
        self.member, self.step = member, step
        if member is None:
            self.known_N = torch.ones_like(step.slots_N, dtype=torch.bool)
            return logits_RV
        self.own_RV = logits_RV
        self.known_N = (self.member_S[step.slots_N] == 1 - member) & (self.position_S[step.slots_N] == step.position_N)
        pair_KNV = [logits_RV[step.first_N], self.logits_SV[step.slots_N]]
        mixed_NV = self.mix_logits(pair_KNV if member == 0 else pair_KNV[::-1], step.slots_N)
        # vLLM also samples from rows whose other logits are unknown; `judge` discards those tokens
        mixed_NV = torch.where(self.known_N[:, None], mixed_NV, pair_KNV[0]).to(logits_RV.dtype)
        return logits_RV.index_copy(0, step.first_N, mixed_NV)

    def judge(self, first_token_N: Tensor, num_sampled_N: Tensor) -> Tensor:
        """How many tokens of each request `[N]` are the mixture's: in a turn one, or none where it was not known."""
        assert self.step is not None
        if self.member is not None:
            num_sampled_N = self.known_N.to(num_sampled_N.dtype)
        self.accepted_N = self.known_N & (self.step.draft_N != NONE) & (first_token_N == self.step.draft_N)
        self._count(num_sampled_N)
        return num_sampled_N

    def _count(self, num_sampled_N: Tensor) -> None:
        assert self.step is not None
        if not self.is_counted:
            return
        self.tokens += num_sampled_N.sum()
        self.passes_K[slice(None) if self.member is None else self.member] += len(num_sampled_N)
        drafter_N = self.member_S[self.step.slots_N]
        is_verified_N = self.known_N & (self.step.draft_N != NONE) & (drafter_N != NONE)
        for counts_K, is_counted_N in (
            (self.drafted_K, is_verified_N),
            (self.accepted_K, is_verified_N & self.accepted_N),
        ):
            counts_K.index_add_(0, drafter_N.clamp(min=0), is_counted_N.long())

    def sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows `[N]` of logits after the requests' last tokens, those tokens' positions, and whether there is one.

        There is none after a joint step, nor where a draft was rejected: this member has not read its correction.
        """
        step = self.step
        assert step is not None
        if self.member is None:
            return step.first_N, step.position_N, torch.zeros_like(self.known_N)
        is_next_N = self.accepted_N.to(step.first_N.dtype)
        return step.first_N + is_next_N, step.position_N + is_next_N, ~self.known_N | self.accepted_N

    def draft(self, draw: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Draw the next drafts, NONE where there is none, and keep the logits that they are drawn from.

        `draw(logits_NV, slots_N, position_N)` draws from each row under its request's temperature.
        """
        step = self.step
        assert step is not None
        rows_N, position_N, has_source_N = self.sources()
        self.member_S[step.slots_N] = torch.where(has_source_N, NONE if self.member is None else self.member, NONE)
        if self.member is None:
            return torch.full_like(step.slots_N, NONE)
        logits_NV = make_finite(self.own_RV[rows_N])
        self.logits_SV[step.slots_N] = logits_NV
        self.position_S[step.slots_N] = position_N
        return torch.where(has_source_N, draw(logits_NV, step.slots_N, position_N), NONE)

    def statistics(self) -> DecodingStatistics:
        """The counts since the start; this waits for the device."""
        lists = {name: getattr(self, f"{name}_K").tolist() for name in ("passes", "drafted", "accepted")}
        return DecodingStatistics(tokens=int(self.tokens), **lists)
