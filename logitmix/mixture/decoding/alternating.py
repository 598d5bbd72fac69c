"""Exact sampling of a mixture of two members at about one member's pass a token: they draft for each other in turns.

Shape legend: K members, B sequences not yet ended, C tokens read in one pass, N drafts, V vocabulary.

This is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) in which the
mixture is the target and each member in turn is the draft model. A member's pass over a draft serves three purposes:
it gives the logits that the mixture lacked to verify the draft, the draft's own cache entry, and the next draft.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.decoding.ragged import has_ended
from logitmix.mixture.decoding.rewinding import RewindableMember
from logitmix.mixture.decoding.sequences import OpenSequences
from logitmix.mixture.decoding.speculation import SpeculativeSampler
from logitmix.mixture.mixing import mix_logits


@dataclass
class DecodingStatistics:
    """Counts over all sequences; the lists have one entry for each member, the policy's first."""

    tokens: int = 0
    passes: list[int] = field(default_factory=lambda: [0, 0])
    drafted: list[int] = field(default_factory=lambda: [0, 0])  # drafts that were verified
    accepted: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def passes_per_token(self) -> float:
        """Passes of a member over a sequence, for each token."""
        return sum(self.passes) / self.tokens if self.tokens else 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of the verified drafts that the mixture accepted; None if there were none."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else None

    def add(self, other: "DecodingStatistics") -> None:
        """Add the counts of `other`."""
        self.tokens += other.tokens
        for name in ("passes", "drafted", "accepted"):
            both = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(self, name, [a + b for a, b in both])

    def since(self, earlier: "DecodingStatistics") -> "DecodingStatistics":
        """The counts after those of `earlier`, from which these went on."""
        result = DecodingStatistics(self.tokens - earlier.tokens)
        for name in ("passes", "drafted", "accepted"):
            both = zip(getattr(self, name), getattr(earlier, name), strict=True)
            setattr(result, name, [a - b for a, b in both])
        return result


class AlternatingDecoder:
    """Decodes sequences of a mixture, alternating or jointly, and may change between them at any step.

    **A joint step** runs every member on the last token and draws the next from their mixture.

    **A turn** of member X of two reads each sequence's last token and the drafts that the other member Y drew one
    after another, each from its own distribution q. X's logits and Y's, which were kept, give the mixture m before
    each draft d. The drafts are verified in order:

    - d is accepted with probability `min(1, m(d) / q(d))`.
    - The first that is not is replaced by a token drawn from `max(m - q, 0)`, normalised; the rest is forgotten.

    Either way the token is distributed as m, whatever q is. Greedy decoding accepts d if it is the argmax of m. Then
    X drafts from its logits after the last token. A sequence whose draft was rejected has a last token that X has not
    read, so X leaves out its first draft. With one draft a turn and the acceptance rate a, a token takes 2 - a passes,
    and each sequence one more at its start.

    `report` is called with the index of a sequence and the ids of its completion as soon as it has ended.

    Before every step, each member that has read anything has read all tokens of a sequence but the last, except for
    the drafts of the member that had the last turn.
    """

    def __init__(
        self,
        model: MixtureBase,
        sequences: OpenSequences,
        sampler: SpeculativeSampler,
        stopping_criteria: StoppingCriteriaList,
        report: Callable[[int, list[int]], None] | None = None,
    ) -> None:
        self.sequences, self.statistics = sequences, DecodingStatistics(passes=[0] * len(model.config.members))
        self._model, self._sampler = model, sampler
        self._stopping_criteria, self._report = stopping_criteria, report
        self._members = [RewindableMember(model, name) for name in model.config.members]
        self._drafter: int | None = None  # the member whose drafts are not verified yet

    def step(self, num_drafts: Sequence[int] | None) -> None:
        """A turn of the next member, after which it drafts at most `num_drafts` of it; a joint step if None."""
        if num_drafts is None:
            self._joint_step()
        else:
            x = 0 if self._drafter is None else 1 - self._drafter
            self._turn(x, num_drafts[x])

    def _joint_step(self) -> None:
        sequences = self.sequences
        if self._drafter is not None:  # it has read the last token, and its own drafts but the last
            self._members[self._drafter].take_back(sequences.num_drafts_B)
            self._drafter = None
            sequences.forget_drafts()
        logits_KBV = [self._read(x, *self._unread(x), keep=1)[:, -1] for x in range(len(self._members))]
        mixed_BV = self._mix(logits_KBV, sequences.weights_BK)
        rows = torch.arange(len(sequences), device=mixed_BV.device)
        tokens_B = self._sampler.sample(mixed_BV, sequences.tokens_BL, sequences.length_B)
        self._drop(self._append(rows, tokens_B, logits_KBV))

    def _turn(self, x: int, num_drafts: int) -> None:
        sequences, N = self.sequences, self.sequences.drafts_BN.shape[1]
        unread_BC, mask_BC = self._unread(x)
        chunk_BC = torch.cat([unread_BC, sequences.drafts_BN], dim=1)
        logits_BCV = self._read(x, chunk_BC, torch.cat([mask_BC, torch.ones_like(sequences.drafts_BN)], 1), keep=N + 1)
        accepted_B, is_open_B = self._verify(x, logits_BCV)

        self._members[x].take_back(N - accepted_B)
        if N > 0:
            # it has read all of its drafts but the last
            self._members[1 - x].take_back((sequences.num_drafts_B - 1 - accepted_B).clamp(min=0))
        all_accepted_B = accepted_B == sequences.num_drafts_B
        after_last_BV = logits_BCV[torch.arange(len(accepted_B), device=accepted_B.device), accepted_B]
        self._drop(is_open_B)
        if len(self.sequences):
            self._draft(x, num_drafts, after_last_BV[is_open_B], all_accepted_B[is_open_B])

    def _verify(self, x: int, logits_BCV: Tensor) -> tuple[Tensor, Tensor]:
        """Verify the drafts and append tokens; return how many each sequence accepted, and whether it is open."""
        sequences = self.sequences
        accepted_B = torch.zeros_like(sequences.num_drafts_B)
        is_open_B = torch.ones_like(accepted_B, dtype=torch.bool)
        for i in range(logits_BCV.shape[1] - 1):
            rows = ((accepted_B == i) & (sequences.num_drafts_B > i) & is_open_B).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            drafts_B, log_q_BV, drafter_BV = sequences.draft(rows, i)
            logits_KBV = [logits_BCV[rows, i], drafter_BV]
            logits_KBV = logits_KBV if x == 0 else logits_KBV[::-1]
            mixed_BV = self._mix(logits_KBV, sequences.weights_BK[rows.cpu()])
            is_accepted_B, tokens_B = self._sampler.verify(
                mixed_BV, drafts_B, log_q_BV, sequences.tokens_BL[rows], sequences.length_B[rows]
            )
            accepted_B[rows] += is_accepted_B
            self.statistics.drafted[1 - x] += len(rows)
            is_open_B[rows] = self._append(rows, tokens_B, logits_KBV)
        self.statistics.accepted[1 - x] += int(accepted_B.sum())
        return accepted_B, is_open_B

    def _draft(self, x: int, num_drafts: int, after_last_BV: Tensor, has_read_last_B: Tensor) -> None:
        """Draft from member x's logits after the last token, where it has read that token, then after each draft."""
        sequences = self.sequences
        N = max(1, min(num_drafts, sequences.num_free_slots()))
        sequences.start_drafts(N, after_last_BV)
        logits_BV, rows = after_last_BV, has_read_last_B.nonzero().squeeze(1)
        for i in range(N):
            if i > 0:
                ids_B1 = sequences.last_B[:, None]
                logits_BV = self._read(x, ids_B1, torch.ones_like(ids_B1), keep=1)[:, -1]
                rows = torch.arange(len(sequences), device=logits_BV.device)
            if len(rows):
                lengths_B = sequences.length_B[rows] + sequences.num_drafts_B[rows]
                drawn_B, log_q_BV = self._sampler.draft(logits_BV[rows], sequences.tokens_BL[rows], lengths_B)
                sequences.add_drafts(rows, drawn_B, log_q_BV, logits_BV[rows])
        self._drafter = x

    def _append(self, rows: Tensor, tokens_B: Tensor, logits_KBV: Sequence[Tensor]) -> Tensor:
        """Append a token to the sequences at `rows`; return whether each is still open."""
        sequences = self.sequences
        sequences.append(rows, tokens_B, logits_KBV)
        self.statistics.tokens += len(rows)
        return ~has_ended(self._stopping_criteria, sequences.tokens_BL[rows], sequences.length_B[rows])

    def _mix(self, logits_KBV: Sequence[Tensor], weights_BK: Tensor) -> Tensor:
        config = self._model.config
        return mix_logits(logits_KBV, weights_BK, config.scheme, config.cut)

    def _unread(self, x: int) -> tuple[Tensor, Tensor]:
        """Tokens and mask `[B, C]` of what member x has not read: the last token, or the whole prompt."""
        if self._members[x].is_empty:
            return self.sequences.prompt_BP, self.sequences.prompt_mask_BP
        last_B1 = self.sequences.tokens_BL.gather(1, self.sequences.length_B[:, None] - 1)
        return last_B1, torch.ones_like(last_B1)

    def _read(self, x: int, ids_BC: Tensor, mask_BC: Tensor, keep: int) -> Tensor:
        self.statistics.passes[x] += len(ids_BC)
        return self._members[x].read(ids_BC, mask_BC, keep)

    def _drop(self, is_open_B: Tensor) -> None:
        """Drop the sequences that have ended, and report them."""
        if not is_open_B.all():
            if self._report is not None:
                for i, ids in self.sequences.completions((~is_open_B).nonzero().squeeze(1)):
                    self._report(i, ids)
            rows = is_open_B.nonzero().squeeze(1)
            self.sequences.select(rows)
            for member in self._members:
                if not member.is_empty:
                    member.select(rows)
