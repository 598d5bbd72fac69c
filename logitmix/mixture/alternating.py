"""Exact sampling of a mixture of two members at about one member's pass a token: they draft for each other in turns.

Shape legend: K = 2 members, B sequences not yet ended, C tokens read in one pass, V vocabulary.

This is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318) with drafts
of one token, in which the mixture is the target and each member in turn is the draft model. A member's pass over a
draft serves three purposes: it gives the logits that the mixture lacked to verify the draft, the draft's own cache
entry, and the next draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.configuration import Alpha, resolve_weights
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.padding import left_pad
from logitmix.mixture.rewinding import RewindableMember
from logitmix.mixture.speculation import SpeculativeSampler


@dataclass
class AlternatingStatistics:
    """Counts over all sequences. `drafted` and `accepted` have one entry for each member, the policy's first."""

    tokens: int = 0
    passes: int = 0
    drafted: list[int] = field(default_factory=lambda: [0, 0])
    accepted: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def passes_per_token(self) -> float:
        """Passes of a member over a sequence, for each token: 2 - acceptance, and one more pass at the start."""
        return self.passes / self.tokens if self.tokens else 0.0

    @property
    def acceptance(self) -> float:
        """The part of all verified drafts that the mixture accepted."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else 0.0


@dataclass
class AlternatingCompletions:
    """Completions as token ids, up to and including EOS, and each member's log-probability of every token.

    `member_log_probs[i][t]` has one number for each member, of its own distribution at temperature 1, untruncated;
    the list is empty unless the log-probabilities were requested.
    """

    token_ids: list[list[int]]
    statistics: AlternatingStatistics
    member_log_probs: list[list[list[float]]]


@torch.no_grad()
def alternating_completions(
    model: MixtureBase,
    prompt_ids: Sequence[Sequence[int]],
    settings: dict[str, Any],
    eos_token_ids: Sequence[int] = (),
    alphas: Alpha | None = None,
    generator: torch.Generator | None = None,
    output_member_log_probs: bool = False,
) -> AlternatingCompletions:
    """Completions of the prompts, distributed as joint decoding's; greedy ones are equal but for ties of rounding.

    Step i runs member X = i mod 2, in which every sequence reads its last token and the draft d that the other member
    Y drew from its own distribution q. X's logits before d and Y's, kept from the pass before, give the mixture m
    there:

    - d is accepted with probability `min(1, m(d) / q(d))`. X draws the next draft from its logits after d.
    - Otherwise the next token is drawn from `max(m - q, 0)`, normalised, and X forgets d. It has no logits after the
      new token, so the next step yields no token: Y reads it and drafts.

    Either way the token is distributed as m, whatever q is. Greedy decoding accepts d if it is the argmax of m. With
    the acceptance rate a, a token takes 2 - a passes, and each sequence one more at its start. Before every step, X
    has read all tokens of a sequence but the last.

    Args:
        model: a mixture of two members that each have their own model.
        prompt_ids: at least one token each.
        settings: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, as `generate` has them. m is
            the mixture's distribution after them; q is the member's own after them.
        eos_token_ids: the tokens that end a completion (`get_eos_token_ids`).
        alphas: the anchor's weight, a number or `[B]`; the configuration's weights by default.
        generator: the random numbers of sampling; torch's default generator of the device if None.
        output_member_log_probs: also return each member's log-probability of every token.

    Raises `ValueError` for other settings, for weights that do not sum to 1, and for members that do not fit.
    """
    weights_BK = _validate(model, prompt_ids, settings, alphas)
    sampler = SpeculativeSampler(settings, generator)
    members = [RewindableMember(model, name) for name in model.config.members]
    ends = set(eos_token_ids)
    out = AlternatingCompletions([[] for _ in prompt_ids], AlternatingStatistics(), [[] for _ in prompt_ids])
    unread = left_pad(prompt_ids, 0, model.device)  # of the member whose turn it is: each starts with the prompts
    open_ = _OpenSequences.start(unread[0][:, -1], weights_BK, model.config.vocab_size)
    x = 0
    while len(open_.index_B):
        own_B2V = members[x].read(*open_.append_drafts(*unread))
        accepted_B = _verify_drafts(open_, x, own_B2V[:, 0], model, sampler, out, output_member_log_probs)
        members[x].take_back(~accepted_B)
        _draft(open_, own_B2V, accepted_B, sampler)

        is_open = [not _has_ended(out.token_ids[i], ends, settings["max_new_tokens"]) for i in open_.index_B.tolist()]
        if not all(is_open):
            rows = torch.tensor(is_open, device=model.device).nonzero().squeeze(1)
            open_.select(rows)
            for member in members:
                member.select(rows)
        x = 1 - x
        if out.statistics.tokens:
            unread = open_.last_B[:, None], torch.ones_like(open_.last_B)[:, None]
    return out


def _verify_drafts(
    open_: "_OpenSequences",
    x: int,
    own_BV: Tensor,
    model: MixtureBase,
    sampler: SpeculativeSampler,
    out: AlternatingCompletions,
    output_member_log_probs: bool,
) -> Tensor:
    """Verify the drafts by member x's logits before them; append a token to each sequence that has one.

    Returns whether each sequence's draft was accepted, `[B]`.
    """
    accepted_B = torch.zeros_like(open_.has_draft_B)
    out.statistics.passes += len(accepted_B)
    rows = open_.has_draft_B.nonzero().squeeze(1)
    if len(rows) == 0:
        return accepted_B
    logits = [own_BV[rows], open_.logits_BV[rows]]
    logits_KBV = logits if x == 0 else logits[::-1]
    mixed_BV = mix_logits(logits_KBV, open_.weights_BK[rows.cpu()], model.config.scheme)
    accepted_B[rows], open_.last_B[rows] = sampler.verify(mixed_BV, open_.draft_B[rows], open_.log_q_BV[rows])

    tokens_B = open_.last_B[rows]
    out.statistics.tokens += len(rows)
    out.statistics.drafted[1 - x] += len(rows)
    out.statistics.accepted[1 - x] += int(accepted_B.sum())
    indices = open_.index_B[rows.cpu()].tolist()
    for i, token in zip(indices, tokens_B.tolist(), strict=True):
        out.token_ids[i].append(token)
    if output_member_log_probs:
        log_probs_KB = [z_BV.float().log_softmax(-1).gather(1, tokens_B[:, None]).squeeze(1) for z_BV in logits_KBV]
        for i, log_probs in zip(indices, torch.stack(log_probs_KB, 1).tolist(), strict=True):
            out.member_log_probs[i].append(log_probs)
    return accepted_B


def _draft(open_: "_OpenSequences", own_B2V: Tensor, accepted_B: Tensor, sampler: SpeculativeSampler) -> None:
    """Draft from the logits after each sequence's last token; a sequence whose draft was rejected lacks them."""
    is_rejected_B = open_.has_draft_B & ~accepted_B
    open_.logits_BV = torch.where(accepted_B[:, None], own_B2V[:, 1], own_B2V[:, 0])
    open_.draft_B, open_.log_q_BV = sampler.draft(open_.logits_BV)
    open_.has_draft_B = ~is_rejected_B


@dataclass
class _OpenSequences:
    """What decoding keeps of the sequences that have not ended. A draft without `has_draft_B` has no meaning."""

    index_B: Tensor  # of the prompt, on the CPU
    weights_BK: Tensor  # on the CPU, as `mix_logits` reads them
    last_B: Tensor  # the last token
    draft_B: Tensor
    has_draft_B: Tensor
    log_q_BV: Tensor  # the distribution that drew the draft
    logits_BV: Tensor  # of the drafting member, after the last token

    @classmethod
    def start(cls, last_B: Tensor, weights_BK: Tensor, vocab_size: int) -> "_OpenSequences":
        index_B, nothing_BV = torch.arange(len(last_B)), last_B.new_zeros(len(last_B), vocab_size)
        no_draft_B = torch.zeros_like(last_B, dtype=torch.bool)
        return cls(index_B, weights_BK, last_B.clone(), last_B.clone(), no_draft_B, nothing_BV, nothing_BV)

    def append_drafts(self, ids_BC: Tensor, mask_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask `[B, C + 1]`: every sequence reads its draft, or one without meaning, which it forgets."""
        draft_B1 = self.draft_B[:, None]
        return torch.cat([ids_BC, draft_B1], dim=1), torch.cat([mask_BC, torch.ones_like(draft_B1)], dim=1)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences at the indices `rows` only."""
        for entry in fields(self):
            values = getattr(self, entry.name)
            setattr(self, entry.name, values[rows.to(values.device)])


def _has_ended(token_ids: list[int], ends: set[int], max_new_tokens: int) -> bool:
    return len(token_ids) >= max_new_tokens or (len(token_ids) > 0 and token_ids[-1] in ends)


def _validate(
    model: MixtureBase, prompt_ids: Sequence[Sequence[int]], settings: dict[str, Any], alphas: Alpha | None
) -> Tensor:
    """The weights `[B, K]`. Raises `ValueError` for what alternating decoding cannot do."""
    config = model.config
    if len(config.members) != 2:
        raise ValueError(
            f"alternating decoding takes 2 members, the mixture has {len(config.members)}; decode jointly"
        )
    if len(config.model_names) != 2:
        raise ValueError(
            "alternating decoding needs members with a model each, these share one model through adapters; use "
            "joint decoding"
        )
    max_new_tokens = settings.get("max_new_tokens")
    if max_new_tokens is None or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; alternating decoding needs a number of at least 1")
    empty = [i for i, ids in enumerate(prompt_ids) if len(ids) == 0]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens; a completion needs at least one before it")
    weights = resolve_weights(alphas, None, 2, config.scheme, config.weights)
    if weights.dim() == 2 and len(weights) != len(prompt_ids):
        raise ValueError(f"alphas has {len(weights)} numbers for {len(prompt_ids)} prompts; pass one for each")
    if ((weights.sum(-1) - 1).abs() > 1e-6).any():
        raise ValueError(
            f"alternating decoding takes the weights 1 - alpha and alpha, which sum to 1, got {weights.tolist()}; "
            "pass alpha, or use joint decoding"
        )
    return weights.expand(len(prompt_ids), 2)
