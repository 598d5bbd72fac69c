"""Log-probability and entropy of the mixture at given tokens, without keeping the mixture's logits.

Shape legend: K members, B batch, T time, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from logitmix.mixture.diagnostics import MixtureDiagnostics, mixture_diagnostics
from logitmix.mixture.mixing import Plausibility, Scheme, Weights, mix_logits, validate_weights

# Elements of a member's logits to mix at a time, 256 MB in float32; at least one whole sequence
_CHUNK_ELEMENTS = 1 << 26


def log_probs_and_entropy(logits_BTV: Tensor, targets_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`log softmax(z / temperature)` at the targets, and the entropy of that softmax, both `[B, T]`.

    Tokens of probability 0 (a logit of -inf) add 0 to the entropy.
    """
    log_probs_BTV = torch.log_softmax(logits_BTV / temperature, dim=-1)
    picked_BT = log_probs_BTV.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
    finite_BTV = log_probs_BTV.masked_fill(torch.isneginf(log_probs_BTV), 0.0)
    return picked_BT, -(log_probs_BTV.exp() * finite_BTV).sum(-1)


def mixture_log_probs(
    logits: Sequence[Tensor],
    weights: Weights,
    targets_BT: Tensor,
    scheme: Scheme = "logit",
    temperature: float = 1.0,
    diagnostics: list[MixtureDiagnostics] | None = None,
    kept_BTV: Tensor | None = None,
    plausibility: Plausibility | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the mixture at the targets, both `[B, T]` in float32 (or float64).

        log softmax(mix_logits(logits, weights, scheme, plausibility) / temperature) at targets_BT

    The temperature divides the *mixed* logits, as when `generate` samples from the mixture. `logits` are K tensors
    `[B, T, V]`. The backward pass recomputes the mixture of each chunk of sequences, so the members' own logits are
    the only vocabulary-sized tensors that outlive the call.

    With `kept_BTV`, the distribution is the one over these tokens, renormalised: the others' logits become -inf.

    Each chunk appends the mixture's diagnostics to the list `diagnostics`, if given, without gradients.
    """
    B, T, V = logits[0].shape
    weights = validate_weights(weights, len(logits), scheme, batch=B)
    rows = max(1, _CHUNK_ELEMENTS // max(1, T * V))

    def chunk(
        weights_BK: Tensor, targets: Tensor, kept: Tensor | None, *chunk_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixed = mix_logits(chunk_logits, weights_BK, scheme, plausibility)
        mixed = mixed if kept is None else mixed.masked_fill(~kept, -torch.inf)
        return log_probs_and_entropy(mixed, targets, temperature)

    results = []
    for start in range(0, B, rows):
        stop = start + rows
        chunk_weights = weights if weights.dim() == 1 else weights[start:stop]
        chunk_logits = [z[start:stop] for z in logits]
        kept = None if kept_BTV is None else kept_BTV[start:stop]
        arguments: tuple[Any, ...] = (chunk_weights, targets_BT[start:stop], kept, *chunk_logits)
        needs_grad = torch.is_grad_enabled() and any(z.requires_grad for z in chunk_logits)
        results.append(
            checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            if needs_grad
            else chunk(*arguments)
        )
        if diagnostics is not None:  # not in `chunk`, which the backward pass runs again
            with torch.no_grad():
                mixed = mix_logits(chunk_logits, chunk_weights, scheme, plausibility)
                diagnostics.append(mixture_diagnostics(chunk_logits, mixed, temperature))
    log_probs, entropies = zip(*results, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)
