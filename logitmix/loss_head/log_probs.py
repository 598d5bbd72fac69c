"""The fused loss head: the mixture's log-probs and their gradient from hidden states, a chunk of tokens at a time.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, D hidden width of a member.

Nothing of size tokens x vocabulary outlives a chunk. The gradient is taken in the forward pass, while a chunk's logits
are in memory, if the derivative of the loss by each log-prob is known by then: eq. 6 has it in closed form
(`clipped_coefficients`), and frozen heads do not need it, because the derivative of each log-prob by its hidden state
fits in memory, `[N, D]`. Otherwise the backward pass recomputes the chunks. `docs/loss_head.md` has the derivation.
"""

from collections.abc import Sequence
from dataclasses import replace
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
from logitmix.loss_head.coefficients import Coefficients
from logitmix.loss_head.general_pass import run_general
from logitmix.loss_head.linear_pass import run_linear
from logitmix.mixture.decoding.support import Support
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import Scheme, Weights, validate_weights


def fused_log_probs(
    hidden: Sequence[Tensor],
    heads: Sequence[Head],
    weights: Weights,
    targets_N: Tensor,
    scheme: Scheme = "logit",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    coefficients: Coefficients | None = None,
    diagnostics: list[MixtureDiagnostics] | None = None,
    share_products: bool = True,
    check: bool = True,
    chunk: int | None = None,
    tile: int | None = None,
    support: Support | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under the mixture, and the entropy of its distribution, both `[N]`.

    In exact arithmetic, equal to

        logits = [head.logits(h)[:, :vocab_size] for h, head in zip(hidden, heads)]
        log_probs_and_entropy(mix_logits(logits, weights, scheme), targets_N, temperature)

    in values and in gradients, by the hidden states, head weights and biases that require them. Computed and
    accumulated in float32 (float64 if an input is), also from bfloat16 and under autocast.

    Args:
        hidden: K tensors `[N, D_k]`, each member's last hidden states.
        heads: K heads.
        weights: `[K]`, or one row for each token, `[N, K]`.
        targets_N: token ids, `0 <= target < vocab_size`.
        temperature: divides the mixed logits.
        vocab_size: number of head rows to use, for heads with padding rows. Default: the rows of the smallest head.
        coefficients: the derivative of the loss by each log-prob, if known beforehand. Used only if it turns out to
            be the loss's own: a wrong one costs time, not correctness.
        diagnostics: a list to which each chunk appends the mixture's diagnostics. Requires non-zero weights.
        share_products: mix the hidden states of members that share a head, for one matrix product in place of
            theirs. False rounds as with `diagnostics`, which need each member's logits: bit for bit the same scores.
        check: validate the values of targets and hidden states, which synchronises with the device.
        chunk: tokens per chunk. Default: as many as fit a fixed memory budget.
        tile: vocabulary rows per matrix product.
        support: the tokens that could have been sampled at each position. The mixed logits of the others count as
            -inf, so that the distribution is the one over the support, renormalised.

    Raises `ValueError` for weights or shapes that do not fit, targets outside the vocabulary, or hidden states that
    are not finite.
    """
    weights = validate_weights(weights, len(hidden), scheme, batch=len(targets_N))
    vocab_size = rows_to_use(heads, vocab_size)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    active = active_members(weights)
    validate_shapes(hidden, heads, targets_N)
    if check:
        _validate_values(hidden, active, targets_N, vocab_size)
    if diagnostics is not None and not weights.all():
        raise ValueError(
            f"weights are {weights.tolist()}; diagnostics need the logits of every member, so no weight may be 0"
        )
    if len(targets_N) == 0:  # an empty result with a graph, so that a batch without tokens can be trained on
        empty = torch.stack([h.sum(-1, dtype=torch.float32) for h in hidden]).sum(0)
        return empty, empty.detach()
    heads = [heads[k] for k in active]
    inputs = LossHeadInputs(
        heads, weights[..., active], targets_N, scheme, temperature, vocab_size, coefficients, chunk, tile,
        diagnostics, share_products and diagnostics is None, half_dtype_of([hidden[k] for k in active]), support,
    )  # fmt: skip
    tensors = [*(hidden[k] for k in active), *(head.weight for head in heads), *(head.bias for head in heads)]
    if not torch.is_grad_enabled():  # the autograd function could not tell
        tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    scores: tuple[Tensor, Tensor] = _FusedLogProbs.apply(inputs, *tensors)  # type: ignore[no-untyped-call]
    return scores


class _FusedLogProbs(torch.autograd.Function):
    """`apply(inputs, *hidden, *head weights, *biases)`; see `fused_log_probs`."""

    @staticmethod
    def forward(ctx: Any, inputs: LossHeadInputs, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        needs_grad, K = ctx.needs_input_grad[1:], len(inputs.heads)
        trains_heads = any(needs_grad[K:])
        used: list[Tensor] = []

        def recorded_coefficients(log_probs: Tensor, tokens: slice) -> Tensor:
            used.append(inputs.coefficients(log_probs, tokens).to(log_probs))  # type: ignore[misc]
            return used[-1]

        ctx.has_gradients = not trains_heads or inputs.coefficients is not None
        needs_grad_now = needs_grad if ctx.has_gradients else [False] * len(needs_grad)
        log_probs, entropy, gradients = run_passes(
            replace(inputs, coefficients=recorded_coefficients), tensors, needs_grad_now
        )
        ctx.inputs = replace(inputs, coefficients=None, diagnostics=None)
        ctx.needs_grad, ctx.gradients = needs_grad, gradients
        ctx.used = torch.cat(used) if used else None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # handed to the caller, so not kept here as well
        if grad is None and grad_entropy is None:
            return (None,) * (1 + len(ctx.needs_grad))
        factor: float | None = None
        if grad is not None and grad_entropy is None and gradients is not None and ctx.has_gradients:
            factor = 1.0 if ctx.used is None else common_factor(grad, ctx.used)
        if factor is None:
            gradients = _recompute_gradients(ctx, grad, grad_entropy)
        if grad_entropy is None:
            for grad_hidden in gradients.hidden:
                if grad_hidden is not None:
                    grad_hidden.mul_(grad.unsqueeze(-1))  # type: ignore[union-attr]
        for grad_head in (*gradients.weight, *gradients.bias):
            if grad_head is not None and factor not in (None, 1.0):
                grad_head.mul_(factor)
        all_gradients = (*gradients.hidden, *gradients.weight, *gradients.bias)
        return None, *(
            g if g is None else g.to(t.dtype) for g, t in zip(all_gradients, ctx.saved_tensors, strict=True)
        )


def _recompute_gradients(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
    """The gradients, from the derivatives of the loss by the scores that the backward pass brought."""
    if grad_entropy is None:
        inputs = replace(ctx.inputs, coefficients=lambda log_probs, tokens: grad[tokens])  # type: ignore[index]
        return run_passes(inputs, ctx.saved_tensors, ctx.needs_grad)[2]
    grad = torch.zeros_like(grad_entropy) if grad is None else grad
    return run_passes(ctx.inputs, ctx.saved_tensors, ctx.needs_grad, (grad, grad_entropy))[2]


def _validate_values(hidden: Sequence[Tensor], active: list[int], targets_N: Tensor, vocab_size: int) -> None:
    outside_N = (targets_N < 0) | (targets_N >= vocab_size)
    broken_KN = torch.stack([~torch.isfinite(hidden[k].detach()).all(-1) for k in active])
    if not (broken_KN.any() | outside_N.any()):  # the only synchronisation of the whole call
        return
    if outside_N.any():
        i = int(outside_N.nonzero()[0])
        raise ValueError(
            f"target {int(targets_N[i])} (token {i}) is outside the members' shared vocabulary of {vocab_size} tokens"
        )
    k, i = broken_KN.nonzero()[0].tolist()
    raise ValueError(
        f"the hidden states of member {active[k]} are not finite at token {i} of {len(targets_N)}; its weights have "
        "diverged, or its dtype has too small a range"
    )


def run_passes(
    inputs: LossHeadInputs,
    tensors: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grad_scores: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs `[N]`, entropies `[N]` and gradients.

    Args:
        tensors: K hidden states, K head weights and K biases.
        needs_grad: whether to compute the gradient by each of the `tensors`. Those by hidden states are of the
            log-probs, those by the heads of `sum(coefficients * log_probs)` with constant coefficients.
        grad_scores: derivatives of the loss by log-probs and entropies. With them all gradients are of the loss.
    """
    K, N = len(inputs.heads), len(inputs.targets_N)
    hidden: list[Tensor] = list(tensors[:K])  # type: ignore[arg-type]
    inputs = replace(
        inputs,
        heads=[
            replace(head, weight=weight, bias=bias)  # type: ignore[arg-type]
            for head, weight, bias in zip(inputs.heads, tensors[K : 2 * K], tensors[2 * K :], strict=True)
        ],
    )
    dtype = accumulation_dtype(tensors)
    gradients = Gradients.zeros(tensors, needs_grad, dtype)
    scores = torch.empty(2, N, dtype=dtype, device=inputs.targets_N.device)
    is_linear = inputs.scheme == "logit" and all(head.softcap is None for head in inputs.heads)
    is_linear = is_linear and inputs.support is None
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        if is_linear and grad_scores is None:
            run_linear(inputs, hidden, scores, gradients)
        else:
            run_general(inputs, hidden, scores, gradients, grad_scores)
    return scores[0], scores[1], gradients
