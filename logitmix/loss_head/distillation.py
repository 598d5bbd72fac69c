"""The fused distillation loss: a student's divergence from a mixture at each token, and its gradient, in chunks.

Shape legend: K members of the teacher, N tokens, n tokens of a chunk, V vocabulary, v tokens of a tile, D width.

Neither the teacher's nor the student's logits of all tokens are ever held. A chunk of tokens takes three passes over
tiles of the vocabulary: the logits of both with their normalisers, the divergence, and the gradient, which needs the
divergence. So the gradient is complete when the forward pass ends; see `docs/loss_head.md`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitmix.loss_head.chunking import (
    Gradients,
    LossHeadInputs,
    accumulation_dtype,
    active_members,
    common_factor,
    half_dtype_of,
    rows_to_use,
    validate_shapes,
)
from logitmix.loss_head.divergence import validate_divergence
from logitmix.loss_head.matmul import add_product, multiply
from logitmix.loss_head.mixture_tiles import MixtureTiles, SumExp
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import Scheme, Weights, validate_weights


def fused_divergence(
    hidden_ND: Tensor,
    head: Head,
    teacher_hidden: Sequence[Tensor],
    teacher_heads: Sequence[Head],
    weights: Weights,
    scheme: Scheme = "logit",
    beta: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of a student from a mixture at each token, and the student's entropy, both `[N]`.

    In exact arithmetic, equal to

        teacher = mix_logits([head.logits(h)[:, :vocab_size] for h, head in zip(teacher_hidden, teacher_heads)], …)
        token_divergence(head.logits(hidden_ND)[:, :vocab_size], teacher, beta, temperature)

    in values and, for the divergence, in gradients by the student's hidden states, head weight and bias. The teacher
    and the entropy get none. Computed in float32 (float64 if an input is), also from bfloat16 and under autocast.

    The head's gradient is taken in the forward pass for a loss that is a multiple of the sum over the tokens, such as
    their mean. For any other, the backward pass recomputes the chunks.

    Args:
        hidden_ND: the student's last hidden states.
        teacher_hidden: K tensors `[N, D_k]`, the last hidden states of the mixture's members.
        weights: of the members, `[K]`, or one row for each token, `[N, K]`.
        beta: 0 for the forward KL, 1 for the reverse KL, between them the generalised JSD: see `token_divergence`.
        temperature: divides the student's logits and the mixture's.
        vocab_size: number of head rows to use, for heads with padding rows. Default: the rows of the smallest head.
        chunk: tokens per chunk. Default: as many as fit a fixed memory budget.
        tile: vocabulary rows per matrix product.

    Raises `ValueError` for weights, shapes, a beta or a temperature that do not fit.
    """
    validate_divergence(beta, temperature)
    N = len(hidden_ND)
    weights = validate_weights(weights, len(teacher_hidden), scheme, batch=N)
    vocab_size = rows_to_use([head, *teacher_heads], vocab_size)
    # one for each token: a divergence has none, but the chunks are cut from them
    targets_N = torch.zeros(N, dtype=torch.long, device=hidden_ND.device)
    validate_shapes(teacher_hidden, teacher_heads, targets_N)
    if hidden_ND.shape != (N, head.weight.shape[1]):
        raise ValueError(
            f"the student's hidden states have shape {list(hidden_ND.shape)}, and its head has width "
            f"{head.weight.shape[1]}; pass [tokens, {head.weight.shape[1]}]"
        )
    if N == 0:  # an empty result with a graph, so that a batch without tokens can be trained on
        empty = hidden_ND.sum(-1, dtype=torch.float32)
        return empty, empty.detach()
    active = active_members(weights)
    teacher = LossHeadInputs(
        [teacher_heads[k] for k in active], weights[..., active], targets_N, scheme, temperature, vocab_size,
        chunk=chunk, tile=tile, half_dtype=half_dtype_of([hidden_ND, *(teacher_hidden[k] for k in active)]),
    )  # fmt: skip
    inputs = _Inputs(teacher, [teacher_hidden[k].detach() for k in active], head, beta)
    tensors = [hidden_ND, head.weight, head.bias]
    if not torch.is_grad_enabled():  # the autograd function could not tell
        tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    result: tuple[Tensor, Tensor] = _FusedDivergence.apply(inputs, *tensors)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Inputs:
    """The arguments of a call; the student's tensors are passed beside them, since gradients reach them."""

    teacher: LossHeadInputs
    teacher_hidden: list[Tensor]
    head: Head
    beta: float


class _FusedDivergence(torch.autograd.Function):
    """`apply(inputs, hidden, weight, bias)`; see `fused_divergence`."""

    @staticmethod
    def forward(ctx: Any, inputs: _Inputs, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.inputs, ctx.needs_grad = inputs, ctx.needs_input_grad[1:]
        divergence_N, entropy_N, ctx.gradients = _run(inputs, tensors, ctx.needs_grad)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(entropy_N)
        return divergence_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # handed to the caller, so not kept here as well
        factor: float | None = None
        if gradients is not None:
            factor = common_factor(grad_N, torch.ones_like(grad_N)) if gradients.reach_heads else 1.0
        if factor is None:
            _, _, gradients = _run(ctx.inputs, ctx.saved_tensors, ctx.needs_grad, grad_N)
        elif gradients.hidden[0] is not None:
            gradients.hidden[0].mul_(grad_N.unsqueeze(-1))
        for gradient in (*gradients.weight, *gradients.bias):
            if gradient is not None and factor not in (None, 1.0):
                gradient.mul_(factor)
        found = (*gradients.hidden, *gradients.weight, *gradients.bias)
        return None, *(g if g is None else g.to(t.dtype) for g, t in zip(found, ctx.saved_tensors, strict=True))


def _run(
    inputs: _Inputs, tensors: Sequence[Tensor | None], needs_grad: Sequence[bool], grad_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """Divergences, entropies and the gradients of their sum, each token's times `grad_N` if given."""
    hidden_ND, weight, bias = tensors
    assert hidden_ND is not None
    assert weight is not None
    student, teacher = replace(inputs.head, weight=weight, bias=bias), inputs.teacher
    read = [*tensors, *inputs.teacher_hidden, *(head.weight for head in teacher.heads)]
    dtype = accumulation_dtype(read)
    gradients = Gradients.zeros(tensors, needs_grad, dtype)
    scores = torch.empty(2, len(hidden_ND), dtype=dtype, device=hidden_ND.device)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        slopes = int(student.softcap is not None)
        # rows of logits that a chunk holds: the student's, the teacher's, and those of its members
        rows = 2 + slopes + (len(teacher.heads) if teacher.scheme == "prob" else 0)
        chunks = list(teacher.chunks(teacher.vocab_size * rows, least=128))
        longest = max(tokens.stop - tokens.start for tokens in chunks)
        buffers = scores.new_empty(2 + slopes, longest, teacher.vocab_size)
        for tokens in chunks:
            _run_chunk(inputs, student, hidden_ND[tokens], tokens, buffers, scores, gradients, grad_N)
    return scores[0], scores[1], gradients


def _run_chunk(
    inputs: _Inputs,
    student: Head,
    hidden_nD: Tensor,
    tokens: slice,
    buffers: Tensor,
    scores: Tensor,
    gradients: Gradients,
    grad_N: Tensor | None,
) -> None:
    """Fill in the scores of a chunk of tokens, and add its part to the gradients."""
    teacher, beta = inputs.teacher, inputs.beta
    student_nV, teacher_nV, *slopes = buffers[:, : len(hidden_nD)]
    slope_nV = slopes[0] if slopes else None
    student_log_n, teacher_log_n = _fill_logits(inputs, student, hidden_nD, tokens, student_nV, teacher_nV, slope_nV)
    divergence_n, entropy_n, mean_n = (torch.zeros_like(scores[0, tokens]) for _ in range(3))
    for tile in teacher.tiles:
        student_nv = student_nV[:, tile].sub_(student_log_n.unsqueeze(-1))
        teacher_nv = teacher_nV[:, tile].sub_(teacher_log_n.unsqueeze(-1))
        _compare(student_nv, teacher_nv, beta, divergence_n, entropy_n, mean_n)
    scores[0, tokens], scores[1, tokens] = divergence_n, entropy_n
    if all(g is None for g in (*gradients.hidden, *gradients.weight, *gradients.bias)):
        return
    # the derivative of a token's loss by its logits before scale, soft cap and temperature, up to the slope of the cap
    factor = (1 - beta if 0 < beta < 1 else 1.0) * (student.scale / teacher.temperature if slope_nV is None else 1.0)
    hidden_nD = hidden_nD.to(scores.dtype)
    (grad_hidden,), (grad_weight,), (grad_bias,) = gradients.hidden, gradients.weight, gradients.bias
    for tile in teacher.tiles:
        grad_nv = student_nV[:, tile]
        if beta > 0:
            grad_nv.mul_(teacher_nV[:, tile].sub_(mean_n.unsqueeze(-1)))
        if slope_nV is not None:
            grad_nv.mul_(slope_nV[:, tile])
        if factor != 1.0:
            grad_nv.mul_(factor)
        if grad_N is not None:
            grad_nv.mul_(grad_N[tokens].to(grad_nv).unsqueeze(-1))
        half = teacher.half_dtype
        if grad_hidden is not None:
            add_product(grad_hidden[tokens], grad_nv, student.weight[tile], half, "hidden_gradient")
        if grad_weight is not None:
            add_product(grad_weight[tile], grad_nv.T, hidden_nD, half, "weight_gradient")
        if grad_bias is not None:
            grad_bias[tile].add_(grad_nv.sum(0))


def _fill_logits(
    inputs: _Inputs,
    student: Head,
    hidden_nD: Tensor,
    tokens: slice,
    student_nV: Tensor,
    teacher_nV: Tensor,
    slope_nV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fill in the chunk's logits, divided by the temperature, and the slope of the student's soft cap.

    Returns `log Σ exp z` of the student and of the teacher.
    """
    n, temperature = len(hidden_nD), inputs.teacher.temperature
    mixture = MixtureTiles(inputs.teacher, inputs.teacher_hidden, tokens, teacher_nV)
    student_sum, teacher_sum = SumExp(n, student_nV), SumExp(n, teacher_nV)
    for tile in inputs.teacher.tiles:
        z_nv = _student_tile(student, hidden_nD, tile, inputs.teacher, student_nV)
        if student.softcap is not None:
            assert slope_nV is not None
            z_nv.div_(student.softcap).tanh_()
            torch.sub(1.0, z_nv.square(), out=slope_nV[:, tile]).mul_(student.scale / temperature)
            z_nv.mul_(student.softcap)
        student_nV[:, tile] = z_nv if temperature == 1.0 else z_nv.div_(temperature)
        student_sum.add(student_nV[:, tile])
        mixture.write(teacher_nV[:, tile], tile)
        teacher_sum.add(teacher_nV[:, tile])
    return student_sum.log(), teacher_sum.log()


def _student_tile(student: Head, hidden_nD: Tensor, tile: slice, inputs: LossHeadInputs, like: Tensor) -> Tensor:
    """`scale * (h @ weight.T + bias)` of a tile, `[n, v]`."""
    z_nv = multiply(hidden_nD, student.weight[tile].T, like.dtype, inputs.half_dtype)
    if student.bias is not None:
        z_nv.add_(student.bias[tile].to(z_nv))
    return z_nv if student.scale == 1.0 else z_nv.mul_(student.scale)


def _compare(
    log_s_nv: Tensor, log_t_nv: Tensor, beta: float, divergence_n: Tensor, entropy_n: Tensor, mean_n: Tensor
) -> None:
    """Add a tile's part to the divergence and the entropy, and prepare the gradient in place of the log-probs.

    With `s`, `t` and `m` as in `token_divergence`, the derivative of a token's divergence by the student's logits is

        beta = 0:      s - t
        beta = 1:      s (log s/t - Σ s log s/t)
        0 < beta < 1:  (1 - beta) s (log s/m - Σ s log s/m)

    `log_s_nv` becomes `s - t` for beta = 0, otherwise `s`, and then `log_t_nv` becomes `log s/t` or `log s/m`, to
    whose mean under `s`, `mean_n`, the tile's part is added. A token of probability 0 adds nothing.
    """
    s_nv = log_s_nv.exp()
    out_nv = s_nv == 0
    entropy_n.sub_(torch.linalg.vecdot(s_nv, log_s_nv.masked_fill(out_nv, 0.0)))
    if beta == 0:
        t_nv = log_t_nv.exp()
        gap_nv = log_t_nv.sub_(log_s_nv).masked_fill_(t_nv == 0, 0.0)
        divergence_n.add_(torch.linalg.vecdot(t_nv, gap_nv))
        torch.sub(s_nv, t_nv, out=log_s_nv)
        return
    if beta < 1:
        t_nv = log_t_nv.exp()
        log_m_nv = torch.logaddexp(log_s_nv + math.log1p(-beta), log_t_nv + math.log(beta))
        gap_nv = (log_t_nv - log_m_nv).masked_fill_(t_nv == 0, 0.0)
        divergence_n.add_(torch.linalg.vecdot(t_nv, gap_nv), alpha=beta)
    else:
        log_m_nv = log_t_nv
    torch.sub(log_s_nv, log_m_nv, out=log_t_nv).masked_fill_(out_nv, 0.0)
    part_n = torch.linalg.vecdot(s_nv, log_t_nv)
    divergence_n.add_(part_n, alpha=1.0 if beta == 1 else 1 - beta)
    mean_n.add_(part_n)
    log_s_nv.copy_(s_nv)
