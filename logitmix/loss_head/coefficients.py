"""The derivative of a loss by each token's log-prob, from which the fused loss head takes gradients in its forward."""

from collections.abc import Callable

from torch import Tensor

Coefficients = Callable[[Tensor, slice], Tensor]
"""Maps the log-probs `[n]` of a chunk and its slice of the N tokens to the derivative of the loss by them, `[n]`,
up to one factor common to all tokens (gradient accumulation, a loss scaler)."""


def clipped_coefficients(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """Derivative of `-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)` by the log-prob of each token.

    `rho = exp(log_probs - old_log_probs)` (arXiv 2605.20555, eq. 5 and 6), or 1 without `old_log_probs`, as in the
    first update after a rollout. The derivative is `-rho A`, and 0 where the clip is active: `rho > 1 + epsilon_high`
    with A > 0, `rho < 1 - epsilon_low` with A < 0.
    """
    if old_log_probs is None:
        return -advantages.expand_as(log_probs)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ((advantages > 0) & (ratio > 1 + epsilon_high)) | ((advantages < 0) & (ratio < 1 - epsilon_low))
    return (-ratio * advantages).masked_fill(clipped, 0.0)
