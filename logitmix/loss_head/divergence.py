"""Divergences of a student from its teacher at each token, from whole logits: the reference of the fused ones.

Shape legend: N tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor


def token_divergence(
    student_NV: Tensor, teacher_NV: Tensor, beta: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649), and the student's entropy, both `[N]`.

    With `s = softmax(student / temperature)`, `t = softmax(teacher / temperature)` and `m = (1 - beta) s + beta t`:

        beta = 0:      KL(t ‖ s), the forward KL
        beta = 1:      KL(s ‖ t), the reverse KL
        0 < beta < 1:  beta KL(t ‖ m) + (1 - beta) KL(s ‖ m)

    as TRL's `DistillationTrainer` defines them: the two ends are not limits of the third line, which goes to 0 there.
    A token of probability 0 (a logit of -inf) adds 0 to `KL(p ‖ q)` where it is p's, and infinity where it is q's
    alone.

    Raises `ValueError` for a beta outside [0, 1] and a temperature that is not positive.
    """
    validate_divergence(beta, temperature)
    log_s_NV = torch.log_softmax(student_NV / temperature, -1)
    log_t_NV = torch.log_softmax(teacher_NV / temperature, -1)
    zero = torch.zeros((), dtype=log_s_NV.dtype, device=log_s_NV.device)
    entropy_N = kl(log_s_NV, zero).neg()
    if beta == 0:
        return kl(log_t_NV, log_s_NV), entropy_N
    if beta == 1:
        return kl(log_s_NV, log_t_NV), entropy_N
    is_out_NV = torch.isneginf(log_s_NV) & torch.isneginf(log_t_NV)
    # the gradient of logaddexp at (-inf, -inf) is NaN, so it sees zeros there
    log_m_NV = torch.logaddexp(
        log_s_NV.masked_fill(is_out_NV, 0.0) + math.log1p(-beta), log_t_NV.masked_fill(is_out_NV, 0.0) + math.log(beta)
    )
    return beta * kl(log_t_NV, log_m_NV) + (1 - beta) * kl(log_s_NV, log_m_NV), entropy_N


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """`Σ_v p log(p / q)`, `[N]`, of log-probabilities; `0 log 0` is 0, with gradient 0."""
    is_out_NV = torch.isneginf(log_p_NV)
    gap_NV = log_p_NV.masked_fill(is_out_NV, 0.0) - log_q_NV.masked_fill(is_out_NV, 0.0)
    return (log_p_NV.exp() * gap_NV).sum(-1)


def validate_divergence(beta: float, temperature: float) -> None:
    """Raise `ValueError` for a beta outside [0, 1] and a temperature that is not positive."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must be between 0 (forward KL) and 1 (reverse KL)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
