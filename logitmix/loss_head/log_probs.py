"""The fused loss head: the mixture's log-probs and their gradient from hidden states, a chunk of tokens at a time.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, D width of a member's hidden states.

Nothing of size tokens x vocabulary outlives a chunk. The gradient is taken in the forward pass, while a chunk's logits
are still there, wherever the loss's coefficient of each token is known by then: of eq. 6 it is a closed form
(`clipped_coefficients`), and with frozen heads it is not needed, since the derivative of each log-prob by its hidden
state can be kept, `[N, D]`. Else the backward pass computes the chunks again. `docs/loss_head.md` has the derivation.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitmix.loss_head.chunking import Coefficients, Gradients, LossHeadInputs
from logitmix.loss_head.general_pass import run_general
from logitmix.loss_head.linear_pass import run_linear
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import Scheme, Weights, validate_weights

# How far the coefficients may be from those that the loss has in the end, relative to the largest.
_TOLERANCE = 1e-5


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
    check: bool = True,
    chunk: int | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under the mixture, and the mixture's entropy there, both `[N]`.

    Equal, in exact arithmetic, to

        logits = [head.logits(h)[:, :vocab_size] for h, head in zip(hidden, heads)]
        log_probs_and_entropy(mix_logits(logits, weights, scheme), targets_N, temperature)

    in values and in gradients, which reach the hidden states, head weights and biases that require them. Computed and
    accumulated in float32 (float64 where an input is), also from bfloat16 and under autocast.

    Args:
        hidden: K tensors `[N, D_k]`, each member's last hidden states.
        heads: K heads. Members with one and the same head share its matrix products.
        weights: `[K]`, or `[N, K]`, a row a token.
        targets_N: tokens, 0 <= target < vocab_size.
        temperature: divides the mixed logits.
        vocab_size: rows of the heads that take part, where some have rows of padding; default the smallest head's.
        coefficients: the loss's derivative by each log-prob, where it is known beforehand. Used only if the loss does
            have it in the end: a wrong one costs time, not correctness.
        diagnostics: a list, to which the mixture's diagnostics are appended, chunk by chunk. Needs weights that are
            all other than 0.
        check: look at the values of targets and hidden states first, for which a device is waited for.
        chunk: tokens of a chunk; by default as many as fit a fixed budget of memory.
        tile: vocabulary rows of one matrix product.

    Raises `ValueError` for weights that do not fit, targets outside the vocabulary, hidden states that are not finite.
    """
    weights = validate_weights(weights, len(hidden), scheme, batch=len(targets_N))
    smallest = min(len(head.weight) for head in heads)
    vocab_size = smallest if vocab_size is None else vocab_size
    if not 0 < vocab_size <= smallest:
        raise ValueError(f"vocab_size is {vocab_size}; the members' heads have {smallest} rows")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    active = (weights.view(-1, len(hidden)) != 0).any(0).nonzero().flatten().tolist()
    active = active or [0]  # all weights 0: the uniform distribution
    _require_fitting(hidden, heads, targets_N)
    if check:
        _require_valid(hidden, active, targets_N, vocab_size)
    if diagnostics is not None and not weights.all():
        raise ValueError(
            f"weights are {weights.tolist()}; a member of weight 0 does not take part, so is not compared"
        )
    if len(targets_N) == 0:  # a graph without values, so that a batch without tokens can be trained on
        nothing = torch.stack([h.sum(-1, dtype=torch.float32) for h in hidden]).sum(0)
        return nothing, nothing.detach()
    heads = [heads[k] for k in active]
    inputs = LossHeadInputs(
        heads, weights[..., active], targets_N, scheme, temperature, vocab_size, coefficients, chunk, tile,
        diagnostics, _half_dtype(hidden[active[0]]),
    )  # fmt: skip
    tensors = [*(hidden[k] for k in active), *(head.weight for head in heads), *(head.bias for head in heads)]
    if not torch.is_grad_enabled():  # which the function below could not see
        tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    scores: tuple[Tensor, Tensor] = _FusedLogProbs.apply(inputs, *tensors)  # type: ignore[no-untyped-call]
    return scores


def clipped_coefficients(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> Tensor:
    """Derivative of `-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A)` by the log-prob of each token.

    `rho = exp(log_probs - old_log_probs)` (arXiv 2605.20555, eq. 5 and 6); without `old_log_probs` it is 1, as in the
    first update after a rollout. The derivative is `-rho A`, and 0 where the clip holds: `rho > 1 + epsilon_high` with
    A > 0, `rho < 1 - epsilon_low` with A < 0.
    """
    if old_log_probs is None:
        return -advantages.expand_as(log_probs)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ((advantages > 0) & (ratio > 1 + epsilon_high)) | ((advantages < 0) & (ratio < 1 - epsilon_low))
    return (-ratio * advantages).masked_fill(clipped, 0.0)


class _FusedLogProbs(torch.autograd.Function):
    """`apply(inputs, *hidden, *head weights, *biases)`; see `fused_log_probs`."""

    @staticmethod
    def forward(ctx: Any, inputs: LossHeadInputs, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        wants, K = ctx.needs_input_grad[1:], len(inputs.heads)
        of_heads = any(wants[K:])
        used: list[Tensor] = []

        def remembered(log_probs: Tensor, tokens: slice) -> Tensor:
            used.append(inputs.coefficients(log_probs, tokens).to(log_probs))  # type: ignore[misc]
            return used[-1]

        ctx.is_taken = not of_heads or inputs.coefficients is not None
        now = wants if ctx.is_taken else [False] * len(wants)
        log_probs, entropy, gradients = run_passes(replace(inputs, coefficients=remembered), tensors, now)
        ctx.inputs, ctx.wants, ctx.gradients = replace(inputs, coefficients=None, diagnostics=None), wants, gradients
        ctx.used = torch.cat(used) if used else None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # the caller's from now on, not kept a second time
        if grad is None and grad_entropy is None:
            return (None,) * (1 + len(ctx.wants))
        factor: float | None = None
        if grad is not None and grad_entropy is None and gradients is not None and ctx.is_taken:
            factor = 1.0 if ctx.used is None else _common_factor(grad, ctx.used)
        if factor is None:
            gradients = _computed_again(ctx, grad, grad_entropy)
        if grad_entropy is None:
            for by_hidden in gradients.hidden:
                if by_hidden is not None:
                    by_hidden.mul_(grad.unsqueeze(-1))  # type: ignore[union-attr]
        for of_head in (*gradients.weight, *gradients.bias):
            if of_head is not None and factor not in (None, 1.0):
                of_head.mul_(factor)
        all_gradients = (*gradients.hidden, *gradients.weight, *gradients.bias)
        return None, *(
            g if g is None else g.to(t.dtype) for g, t in zip(all_gradients, ctx.saved_tensors, strict=True)
        )


def _computed_again(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
    """The gradients, now that the loss's derivatives by the scores are known."""
    if grad_entropy is None:
        inputs = replace(ctx.inputs, coefficients=lambda log_probs, tokens: grad[tokens])  # type: ignore[index]
        return run_passes(inputs, ctx.saved_tensors, ctx.wants)[2]
    grad = torch.zeros_like(grad_entropy) if grad is None else grad
    return run_passes(ctx.inputs, ctx.saved_tensors, ctx.wants, (grad, grad_entropy))[2]


def _common_factor(grad_N: Tensor, used_N: Tensor) -> float | None:
    """`f` such that `grad = f * used`, or None where there is none."""
    factor = (grad_N * used_N).sum() / (used_N * used_N).sum().clamp(min=torch.finfo(used_N.dtype).tiny)
    error, largest = (grad_N - factor * used_N).abs().max(), grad_N.abs().max()
    found, is_close = torch.stack([factor, (error <= _TOLERANCE * largest).to(factor)]).tolist()
    return found if is_close else None


def _half_dtype(hidden: Tensor) -> torch.dtype | None:
    """What a linear layer would multiply `hidden` in here, where that is of half precision."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _require_fitting(hidden: Sequence[Tensor], heads: Sequence[Head], targets_N: Tensor) -> None:
    N = len(targets_N)
    if len(heads) != len(hidden):
        raise ValueError(f"there are hidden states of {len(hidden)} members and {len(heads)} heads")
    for k, (h, head) in enumerate(zip(hidden, heads, strict=True)):
        if h.shape != (N, head.weight.shape[1]):
            raise ValueError(
                f"the hidden states of member {k} have shape {list(h.shape)}; {N} targets and a head of width "
                f"{head.weight.shape[1]} need [{N}, {head.weight.shape[1]}]"
            )


def _require_valid(hidden: Sequence[Tensor], active: list[int], targets_N: Tensor, vocab_size: int) -> None:
    outside_N = (targets_N < 0) | (targets_N >= vocab_size)
    broken_KN = torch.stack([~torch.isfinite(hidden[k].detach()).all(-1) for k in active])
    if not (broken_KN.any() | outside_N.any()):  # the one look at values in the whole call
        return
    if outside_N.any():
        i = int(outside_N.nonzero()[0])
        raise ValueError(
            f"target {int(targets_N[i])} (token {i}) is outside the vocabulary of {vocab_size} tokens that the "
            "members share"
        )
    k, i = broken_KN.nonzero()[0].tolist()
    raise ValueError(
        f"the hidden states of member {active[k]} hold a value that is not finite at token {i} of {len(targets_N)}; "
        "its weights have diverged, or its dtype is too narrow for it"
    )


def run_passes(
    inputs: LossHeadInputs,
    tensors: Sequence[Tensor | None],
    wants: Sequence[bool],
    grad_scores: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs `[N]`, entropies `[N]` and the gradients that `wants` names.

    `tensors` are K hidden states, K head weights and K biases, `wants` one truth value for each. The heads' gradients
    are of `sum(coefficients * log_probs)`, the coefficients taken as constants. With `grad_scores`, the loss's
    derivatives by log-probs and entropies, all gradients are of the loss itself.
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
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    zeros = [
        torch.zeros_like(t, dtype=dtype) if t is not None and want else None
        for t, want in zip(tensors, wants, strict=True)
    ]
    gradients = Gradients(zeros[:K], zeros[K : 2 * K], zeros[2 * K :])
    scores = torch.empty(2, N, dtype=dtype, device=inputs.targets_N.device)
    is_linear = inputs.scheme == "logit" and all(head.softcap is None for head in inputs.heads)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        if is_linear and grad_scores is None:
            run_linear(inputs, hidden, scores, gradients)
        else:
            run_general(inputs, hidden, scores, gradients, grad_scores)
    return scores[0], scores[1], gradients
