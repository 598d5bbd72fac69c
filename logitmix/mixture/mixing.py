"""Mixing the logits of K models of one vocabulary into one next-token distribution.

Shape legend: K members, B batch, V vocabulary, `...` any axes between (time, usually).

The convention of alpha is defined here and nowhere else: **alpha is the weight of the anchor**, so alpha = 0
is the policy alone and alpha = 1 the anchor alone (Gan & Zhu, arXiv 2605.20555, eq. 1).
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scheme = Literal["logit", "prob"]
SCHEMES: tuple[str, ...] = get_args(Scheme)

Weights = Sequence[float] | Sequence[Sequence[float]] | Tensor
"""One weight per member, for the batch `[K]` or for each sequence `[B, K]`."""

_LARGEST_WEIGHT = 1e30  # times a logit of 1e8 is the largest number of float32
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Plausibility:
    """The tokens that one member finds plausible, which are left to the mixture (Li et al. 2023, arXiv 2210.15097).

        V(x) = { v : p_m(v | x) >= threshold * max_u p_m(u | x) }

    for the member m with that index, at temperature 1. All tokens are left where m, or every other member, has weight
    0: m does not run, or is the only one that does.

    Raises `ValueError` for a threshold outside (0, 1].
    """

    threshold: float
    member: int = 0

    def __post_init__(self) -> None:
        is_number = isinstance(self.threshold, Real) and not isinstance(self.threshold, bool)
        if not (is_number and 0 < self.threshold <= 1):
            raise ValueError(
                f"plausibility is {self.threshold!r}, but must be above 0 and at most 1: the share of the most "
                "probable token's probability that a token needs; None leaves all tokens"
            )

    def applies(self, weights: Tensor) -> Tensor:
        """Whether there is a cut at weights `[..., K]`."""
        has_weight = weights != 0
        return has_weight[..., self.member] & (has_weight.sum(-1) > 1)

    def ruled_out(self, logits: Tensor) -> Tensor:
        """Whether each token, `[..., V]`, is left out, from the logits of the member."""
        z = _upcast(logits)
        return z < z.amax(-1, keepdim=True) + math.log(self.threshold)


def alpha_to_weights(alpha: float | Sequence[float] | Tensor) -> Tensor:
    """The weights of policy and anchor, `[1 - alpha, alpha]`: `[2]` for one alpha, `[B, 2]` for one per sequence."""
    alpha = _as_numbers(alpha, "alpha is")
    if alpha.dim() > 1:
        raise ValueError(
            f"alpha has shape {list(alpha.shape)}; pass one number, or one number for each sequence of the batch"
        )
    return torch.stack([1 - alpha, alpha], dim=-1)


def weights_to_alpha(weights: Sequence[float]) -> float | None:
    """The alpha of two weights that sum to 1, `[1 - alpha, alpha]`; None for others, such as `[1, -1]`."""
    return weights[1] if len(weights) == 2 and abs(sum(weights) - 1) <= _SUM_TOLERANCE else None


def validate_weights(weights: Weights, num_members: int, scheme: str, batch: int | None = None) -> Tensor:
    """Return `weights` as a float64 CPU tensor `[K]` or `[B, K]`; raise `ValueError` if they are invalid.

    The scheme `"logit"` takes any real weights: negative ones give contrastive decoding, DExperts and proxy tuning.
    The scheme `"prob"` takes only a distribution over the members. `batch` is the number of sequences, if known.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; it must be one of {', '.join(map(repr, SCHEMES))}")
    weights = _as_numbers(weights, "weights are")
    if weights.dim() not in (1, 2) or weights.shape[-1] != num_members:
        raise ValueError(
            f"weights have shape {list(weights.shape)} for {num_members} members; "
            f"pass {num_members} numbers, or one row of {num_members} for each sequence of the batch"
        )
    if weights.dim() == 2 and batch is not None and len(weights) != batch:
        raise ValueError(f"weights have {len(weights)} rows for a batch of {batch} sequences")
    if not torch.isfinite(weights).all():
        raise ValueError(f"weights are not finite: {weights.tolist()}")
    if (weights.abs() > _LARGEST_WEIGHT).any():
        raise ValueError(
            f"weights are {weights.tolist()}, but must be at most {_LARGEST_WEIGHT:g} in size: their products with "
            "logits would overflow float32"
        )
    if scheme == "prob":
        is_distribution = (weights >= 0).all() and ((weights.sum(-1) - 1).abs() <= _SUM_TOLERANCE).all()
        if not is_distribution:
            raise ValueError(
                f"scheme 'prob' needs weights >= 0 that sum to 1 (alpha within [0, 1]), got {weights.tolist()}; "
                "scheme 'logit' takes any real weights"
            )
    return weights


def _as_numbers(values: Any, name: str) -> Tensor:
    """The values in float64 on the CPU, so that reading them never synchronises with a device."""
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} {reprlib.repr(values)}, but must be numbers") from error


def mix_logits(
    logits: Sequence[Tensor], weights: Weights, scheme: Scheme = "logit", plausibility: Plausibility | None = None
) -> Tensor:
    """Logits `[B, ..., V]` of the mixture of K members, in float32 (float64 if a member's are).

    `logits` are K tensors `[B, ..., V]`; `weights` are `[K]`, or one row for each sequence, `[B, K]`.

    - `"logit"`, a geometric mean (eq. 1): `sum_k w_k * z_k`. The result is unnormalised, like any logits.
    - `"prob"`, an arithmetic mean (section 5): `log(sum_k w_k * softmax(z_k))`, normalised log-probabilities.

    A member of weight 0 is ignored, even if its logits are infinite or NaN. A token that a member of positive weight
    rules out with a logit of -inf stays ruled out, whatever the logits of members of negative weight. `plausibility`
    sets the logits of other tokens than its own to -inf.

    >>> policy, anchor = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    >>> mixed = mix_logits([policy, anchor], alpha_to_weights(0.3))
    >>> torch.testing.assert_close(mixed, 0.7 * policy + 0.3 * anchor)

    Raises `ValueError` for weights that `validate_weights` rejects.
    """
    weights = validate_weights(weights, len(logits), scheme, batch=len(logits[0]))
    active = [k for k in range(len(logits)) if (weights[..., k] != 0).any()]
    if not active:  # every weight is 0: the uniform distribution
        return torch.zeros_like(_upcast(logits[0]))
    terms = [_weigh(_upcast(logits[k]), weights[..., k], scheme) for k in active]
    if scheme == "prob":
        mixed = _logsumexp(terms)
    else:
        mixed = torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0])
        if (weights < 0).any():  # only then can a term be +inf, and the sum NaN
            ruled_out = torch.stack([torch.isneginf(term) for term in terms]).any(0)
            mixed = mixed.masked_fill(ruled_out, -torch.inf)
    if plausibility is not None and (has_cut := plausibility.applies(weights)).any():
        ruled_out = plausibility.ruled_out(logits[plausibility.member].detach())
        if not has_cut.all():
            ruled_out &= has_cut.to(mixed.device).view(-1, *[1] * (mixed.dim() - 1))
        mixed = mixed.masked_fill(ruled_out, -torch.inf)
    return mixed


def _upcast(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _weigh(z_BV: Tensor, weight: Tensor, scheme: str) -> Tensor:
    """`w * z` (logit) or `log w + log softmax(z)` (prob) for one member; `weight` is a scalar or `[B]`."""
    off = torch.empty(0, dtype=torch.long)
    if weight.dim() == 1:
        weight = weight.to(z_BV.dtype)  # first: a weight below float32's smallest becomes 0
        off = (weight == 0).nonzero().squeeze(1).to(z_BV.device)
        weight = weight.to(z_BV.device).view(-1, *[1] * (z_BV.dim() - 1))
    if scheme == "prob":
        if len(off) and z_BV.requires_grad:
            # behind a softmax, the gradient of an infinite or NaN row would be NaN, not 0
            z_BV = z_BV.index_fill(0, off, 0.0)
        term_BV = torch.log_softmax(z_BV, dim=-1) + weight.log()
    else:
        term_BV = z_BV * weight
    # only the rows of weight 0, in place: masking all logits would cost as much as the product
    return term_BV.index_fill_(0, off, -torch.inf if scheme == "prob" else 0.0) if len(off) else term_BV


def _logsumexp(terms: list[Tensor]) -> Tensor:
    """`log(sum_k exp(term_k))`. A token that every member rules out stays at -inf, with gradient 0."""
    out = terms[0]
    for term in terms[1:]:
        if not (out.requires_grad or term.requires_grad):
            out = torch.logaddexp(out, term)
            continue
        ruled_out = torch.isneginf(out) & torch.isneginf(term)
        # the gradient of logaddexp at (-inf, -inf) is NaN, so it sees zeros there
        mixed = torch.logaddexp(out.masked_fill(ruled_out, 0.0), term.masked_fill(ruled_out, 0.0))
        out = mixed.masked_fill(ruled_out, -torch.inf)
    return out
