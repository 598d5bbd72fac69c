"""alpha against the strength beta of a KL penalty: which penalty decoding at another alpha corresponds to.

The optimum of `E[r] - beta KL(pi ‖ anchor)` is `pi_beta ∝ anchor · exp(r / beta)`. Its geometric mixture with the
anchor is the optimum at a larger beta (Liu et al. 2024, "Decoding-time realignment of language models"):

    pi_beta^(1 - alpha) anchor^alpha ∝ pi_(beta / (1 - alpha))

Of whole responses this is exact; a mixture of each token's distribution approximates it.
"""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from logitmix.mixture.mixing import mix_logits


def equivalent_beta(beta: float, alpha: float, trained_alpha: float = 0.0) -> float:
    """The beta that decoding at `alpha` corresponds to, of a mixture trained with `beta` at `trained_alpha`:
    `beta (1 - trained_alpha) / (1 - alpha)`. A policy trained alone has `trained_alpha` 0. Infinite at alpha 1.

    Raises `ValueError` for a beta that is not positive, and for an alpha outside [0, 1] (`trained_alpha`: below 1).
    """
    _validate(beta, trained_alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, but must be from 0 to 1")
    return inf if alpha == 1 else beta * (1 - trained_alpha) / (1 - alpha)


def equivalent_alpha(beta: float, target_beta: float, trained_alpha: float = 0.0) -> float:
    """The alpha at which decoding corresponds to `target_beta`, the inverse of `equivalent_beta`.

    Raises `ValueError` for a target below that of the policy alone, which no alpha >= 0 reaches.
    """
    _validate(beta, trained_alpha)
    least = equivalent_beta(beta, 0.0, trained_alpha)
    if not target_beta >= least:
        raise ValueError(
            f"beta {target_beta:g} is below {least:g}, that of the policy alone: decoding only adds to the KL penalty "
            "of the training; train with a smaller beta"
        )
    return 1 - least / target_beta


def kl_to_anchor(policy: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """`KL(m ‖ anchor)` of the geometric mixture m at `alpha`, in nats, for each position; logits are `[..., V]`.

    It falls as alpha rises: its derivative is `-(1 - alpha) Var_m(log policy - log anchor)`.
    """
    return kl_divergence(log_mixture(policy, anchor, alpha), anchor.log_softmax(-1))


def log_mixture(policy: Tensor, anchor: Tensor, alpha: float) -> Tensor:
    """Log-probabilities of the geometric mixture at `alpha`; logits are `[..., V]`."""
    return mix_logits((policy, anchor), (1 - alpha, alpha), "logit").log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p ‖ q)` over the last axis, from log-probabilities; a token that p rules out counts as 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1).clamp(min=0)


def alpha_for_kl(kl: Callable[[float], float], budget: float, steps: int = 30) -> float:
    """The smallest alpha at which `kl(alpha)`, which falls with alpha, is within the budget, by bisection.

    0 where the policy alone is within the budget. Raises `ValueError` for a budget that is not positive.
    """
    if not budget > 0:
        raise ValueError(f"the KL budget is {budget}, but must be above 0; only the anchor itself has none")
    if kl(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if kl(middle) <= budget else (middle, high)
    return high


def reweighting(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Normalised importance weights `[N]` of N samples, from their log-probabilities under the model that they were
    drawn from and under another."""
    return torch.softmax((other_log_probs - log_probs).double(), dim=0)


def coverage(log_probs: Tensor, other_log_probs: Tensor) -> float:
    """About how much of the other model's probability is on responses like the samples: the mean of the importance
    ratios, at most 1. Its expectation is 1; it is lower where the other model often gives what was never drawn, and
    then the effective sample size does not tell that the weights mislead."""
    return min(1.0, float((other_log_probs - log_probs).double().exp().mean()))


def _validate(beta: float, trained_alpha: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}, but must be above 0")
    if not 0 <= trained_alpha < 1:
        raise ValueError(f"the alpha of the training is {trained_alpha}, but must be at least 0 and below 1")
