"""Scoring tokens under a mixture from its members' logits.

Shape legend: K members, B batch, T time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitmix.mixture.configuration import Alpha
from logitmix.mixture.decoding.support import SequenceSupport, Support
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.logprobs import mixture_log_probs
from logitmix.mixture.member_prompts import MemberPrompts, Prompts, validate_prompts_end_together
from logitmix.mixture.mixing import Weights
from logitmix.mixture.padding import left_pad, position_ids_from_mask
from logitmix.mixture.router import WITH_ROUTER_LOGITS, load_balancing_loss
from logitmix.mixture.running import RunningMixture


def num_labelled(labels: Tensor) -> int:
    """The number of columns `[B, T]` from the first with a label other than -100 on."""
    labelled = (labels != -100).any(0).nonzero()
    return labels.shape[1] - int(labelled[0]) if len(labelled) else 0


def score_labels(
    model: RunningMixture,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    diagnostics: list[MixtureDiagnostics] | None = None,
    aux_losses: list[Tensor] | None = None,
    supports: Sequence[SequenceSupport] | None = None,
    member_prompts: MemberPrompts | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label under the mixture, and the mixture's entropy at it, both `[B, T - 1]`.

    Both are 0 where the label is -100. Each chunk of sequences appends its diagnostics to `diagnostics`, if given, for
    the positions from the first label of the batch on. The policy's load-balancing loss is appended to `aux_losses`,
    if given. With the `supports` of the completions that the labels are, probabilities are those of the kept tokens.
    Members with `member_prompts` read these before the tokens from the first label of the batch on.
    """
    targets = labels[:, 1:]
    if member_prompts is not None:
        validate_prompts_end_together(targets != -100, attention_mask)
    T = targets.shape[1]
    keep = max(num_labelled(targets), 1)
    # Mix the logits even of members that share a head: diagnostics need each member's, and the ratio of a score with
    # diagnostics to one without must be exactly 1, not 1 up to the rounding of another order of operations.
    logits, weights, _, outputs = model.run_members(
        weights,
        input_ids,
        attention_mask,
        position_ids_from_mask(attention_mask),
        use_cache=False,
        logits_to_keep=keep + 1,
        mix_before_head=False,
        policy_kwargs=None if aux_losses is None else WITH_ROUTER_LOGITS,
        member_prompts=member_prompts,
    )
    if aux_losses is not None:
        aux_losses.append(load_balancing_loss(model.policy.config, outputs[0], attention_mask))
    targets = targets[:, T - keep :]
    logits = [z[:, :-1] for z in logits]
    kept_BTV = None
    if supports is not None:
        is_scored = targets != -100
        kept_BTV = Support.of_scored(supports, is_scored).mask_BTV(is_scored, logits[0].shape[-1])
    scores = mixture_log_probs(
        logits,
        weights,
        targets.clamp(min=0),
        model.config.scheme,
        temperature,
        diagnostics,
        kept_BTV,
        model.config.cut,
    )
    log_probs, entropy = (nn.functional.pad(x.masked_fill(targets == -100, 0.0), (T - keep, 0)) for x in scores)
    return log_probs, entropy


def score_and_diagnose_labels(
    model: RunningMixture,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    aux_losses: list[Tensor] | None = None,
    supports: Sequence[SequenceSupport] | None = None,
    member_prompts: MemberPrompts | None = None,
) -> tuple[Tensor, Tensor, MixtureDiagnostics]:
    """As `score_labels`, with the diagnostics of the same tokens: `[B, T - 1]`, and `kl_K` `[B, T - 1, K]`.

    Raises `ValueError` if a weight is 0: that member does not run, so there is nothing to compare with.
    """
    if (weights == 0).any():
        raise ValueError(
            f"weights are {weights.tolist()}; diagnostics need the logits of every member, so no weight may be 0"
        )
    chunks: list[MixtureDiagnostics] = []
    scores = score_labels(
        model, input_ids, attention_mask, labels, weights, temperature, chunks, aux_losses, supports, member_prompts
    )
    ignored = labels[:, 1:] == -100
    fields = []
    for parts in zip(*chunks, strict=True):
        values = torch.cat(parts)
        padded = values.new_zeros(*ignored.shape, *values.shape[2:])
        padded[:, ignored.shape[1] - values.shape[1] :] = values
        padded[ignored] = 0
        fields.append(padded)
    return *scores, MixtureDiagnostics(*fields)


def following_prompts(model: PreTrainedModel, num_tokens: int) -> dict[str, Any]:
    """Arguments of a forward pass that give the logits before each of the last `num_tokens` tokens, and after them.

    Of a mixture with prompts of its members in the configuration, which read these before the tokens; else none.
    """
    prompts = getattr(model.config, "member_prompts", None)
    return {"member_prompts": prompts, "logits_to_keep": num_tokens + 1} if prompts else {}


@torch.no_grad()
def continuation_logits(
    model: RunningMixture, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Tensor:
    """The mixture's logits `[B, T, V]` at each token of the longest continuation, of token ids of any lengths.

    Entry `[b, t]` is the distribution of token t of `continuations[b]` after `contexts[b]` and the tokens before t;
    entries after the last token of a row have no meaning. A member with a prompt of its own in the configuration reads
    that in place of the context, as in `generate`.
    """
    prompt_ids, prompt_mask = left_pad(contexts, 0, model.device)
    read = [list(ids[:-1]) for ids in continuations]
    T = max(map(len, continuations))
    shared_ids = torch.tensor([[*ids, *[0] * (T - 1 - len(ids))] for ids in read], dtype=torch.long)
    shared_mask = torch.tensor([[1] * len(ids) + [0] * (T - 1 - len(ids)) for ids in read], dtype=torch.long)
    mask = torch.cat([prompt_mask, shared_mask.to(prompt_mask)], dim=1)
    logits: Tensor = model(
        input_ids=torch.cat([prompt_ids, shared_ids.to(prompt_ids)], dim=1),
        attention_mask=mask,
        position_ids=position_ids_from_mask(mask),
        use_cache=False,
        logits_to_keep=T,
        member_prompts=model.config.member_prompts or None,
    ).logits
    return logits


class ScoringMixture(RunningMixture):
    """A mixture with methods that score tokens."""

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        alpha: Alpha | None = None,
        weights: Weights | None = None,
        member_prompts: Mapping[str, Prompts] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label under the mixture, and the mixture's entropy at it, both `[B, T - 1]`.

        Entry t scores the token at t + 1. Both are 0 where the label is -100. The temperature divides the mixed
        logits, so these are the log-probabilities of the tokens as `generate(temperature=…)` samples them.

        A member in `member_prompts` reads that prompt before the tokens from the first label of the batch on.
        """
        resolved = self._resolve_weights(alpha, weights)
        prompts = self._member_prompts(member_prompts, input_ids)
        return score_labels(self, input_ids, attention_mask, labels, resolved, temperature, member_prompts=prompts)

    def score_and_diagnose(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        alpha: Alpha | None = None,
        weights: Weights | None = None,
        member_prompts: Mapping[str, Prompts] | None = None,
    ) -> tuple[Tensor, Tensor, MixtureDiagnostics]:
        """As `score`, with the mixture's diagnostics `[B, T - 1]` of the same tokens (`kl_K` is `[B, T - 1, K]`).

        Raises `ValueError` if a weight is 0: that member does not run, so there is nothing to compare with.
        """
        resolved = self._resolve_weights(alpha, weights)
        prompts = self._member_prompts(member_prompts, input_ids)
        return score_and_diagnose_labels(
            self, input_ids, attention_mask, labels, resolved, temperature, member_prompts=prompts
        )
