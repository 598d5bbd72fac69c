"""Scoring tokens under a mixture from its members' logits.

Shape legend: K members, B batch, T time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.decoding.support import SequenceSupport, Support
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.logprobs import mixture_log_probs
from logitmix.mixture.padding import position_ids_from_mask
from logitmix.mixture.router import WITH_ROUTER_LOGITS, load_balancing_loss


def score_labels(
    model: MixtureBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    diagnostics: list[MixtureDiagnostics] | None = None,
    aux_losses: list[Tensor] | None = None,
    supports: Sequence[SequenceSupport] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label under the mixture, and the mixture's entropy at it, both `[B, T - 1]`.

    Both are 0 where the label is -100. Each chunk of sequences appends its diagnostics to `diagnostics`, if given, for
    the positions from the first label of the batch on. The policy's load-balancing loss is appended to `aux_losses`,
    if given. With the `supports` of the completions that the labels are, probabilities are those of the kept tokens.
    """
    targets = labels[:, 1:]
    T, scored = targets.shape[1], (targets != -100).any(0).nonzero()
    keep = T - int(scored[0]) if len(scored) else 1
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
    model: MixtureBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    aux_losses: list[Tensor] | None = None,
    supports: Sequence[SequenceSupport] | None = None,
) -> tuple[Tensor, Tensor, MixtureDiagnostics]:
    """As `score_labels`, with the diagnostics of the same tokens: `[B, T - 1]`, and `kl_K` `[B, T - 1, K]`.

    Raises `ValueError` if a weight is 0: that member does not run, so there is nothing to compare with.
    """
    if (weights == 0).any():
        raise ValueError(
            f"weights are {weights.tolist()}; diagnostics need the logits of every member, so no weight may be 0"
        )
    chunks: list[MixtureDiagnostics] = []
    scores = score_labels(model, input_ids, attention_mask, labels, weights, temperature, chunks, aux_losses, supports)
    ignored = labels[:, 1:] == -100
    fields = []
    for parts in zip(*chunks, strict=True):
        values = torch.cat(parts)
        padded = values.new_zeros(*ignored.shape, *values.shape[2:])
        padded[:, ignored.shape[1] - values.shape[1] :] = values
        padded[ignored] = 0
        fields.append(padded)
    return *scores, MixtureDiagnostics(*fields)
