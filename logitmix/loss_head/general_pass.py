"""The general pass of the fused loss head: any scheme, soft caps, kept supports, and gradients through the entropy.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, D hidden width of a member.
"""

import torch
from torch import Tensor

from logitmix.loss_head.chunking import Gradients, LossHeadInputs
from logitmix.loss_head.matmul import add_product, multiply
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.logprobs import log_probs_and_entropy
from logitmix.mixture.mixing import mix_logits


def run_general(
    inputs: LossHeadInputs,
    hidden: list[Tensor],
    scores: Tensor,
    gradients: Gradients,
    grad_scores: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill in `scores` (log-probs and entropies, `[2, N]`) and `gradients`, from whole rows of logits.

    The products with the heads are differentiated here, everything from the logits to the scores by autograd.
    """
    needs_grad = [
        any(g is not None for g in (gradients.hidden[k], gradients.weight[k], gradients.bias[k]))
        for k in range(len(hidden))
    ]
    # rows of logits that a member takes with autograd's intermediate results: about 6 with a gradient, 3 without
    rows = 3 * len(hidden) + 3 * sum(needs_grad) + (0 if inputs.support is None else 2)
    for tokens in inputs.chunks(inputs.vocab_size * rows, least=32):
        products = [project(inputs, head, h[tokens], scores) for head, h in zip(inputs.heads, hidden, strict=True)]
        leaves = [z.requires_grad_() for z, needed in zip(products, needs_grad, strict=True) if needed]
        weights = inputs.weights if inputs.weights.dim() == 1 else inputs.weights[tokens]
        with torch.set_grad_enabled(any(needs_grad)):
            logits = [head.transform(z) for head, z in zip(inputs.heads, products, strict=True)]
            mixed = mix_logits(logits, weights, inputs.scheme)
            possible = mixed
            if inputs.support is not None:
                possible = mixed.masked_fill(~inputs.support.mask(tokens, inputs.vocab_size), -torch.inf)
            chunk_scores = log_probs_and_entropy(possible, inputs.targets_N[tokens], inputs.temperature)
        if inputs.diagnostics is not None:
            inputs.diagnostics.append(mixture_diagnostics(logits, mixed, inputs.temperature))
        del logits, mixed, possible
        for out, score in zip(scores, chunk_scores, strict=True):
            out[tokens] = score.detach()
        if not leaves:
            continue
        ones_n = torch.ones_like(scores[0, tokens])
        upstream = (ones_n, torch.zeros_like(ones_n)) if grad_scores is None else tuple(g[tokens] for g in grad_scores)
        grad_logits = iter(torch.autograd.grad(chunk_scores, leaves, upstream))
        coefficients_n = ones_n
        if gradients.reach_heads and grad_scores is None:
            assert inputs.coefficients is not None
            coefficients_n = inputs.coefficients(scores[0, tokens], tokens).to(ones_n)
        for k, needed in enumerate(needs_grad):
            if needed:
                _add_gradients(inputs, k, next(grad_logits), hidden[k], tokens, coefficients_n, gradients)


def project(inputs: LossHeadInputs, head: Head, hidden_nD: Tensor, like: Tensor) -> Tensor:
    """`h @ weight.T + bias`, `[n, V]`, in the dtype of `like`."""
    z_nV = like.new_empty(len(hidden_nD), inputs.vocab_size)
    for tile in inputs.tiles:
        z_nV[:, tile] = multiply(hidden_nD, head.weight[tile].T, like.dtype, inputs.half_dtype)
    return z_nV if head.bias is None else z_nV.add_(head.bias[: inputs.vocab_size])


def _add_gradients(
    inputs: LossHeadInputs,
    k: int,
    grad_nV: Tensor,
    hidden_ND: Tensor,
    tokens: slice,
    coefficients_n: Tensor,
    gradients: Gradients,
) -> None:
    """Add the chunk's part to the gradients of member k, from the gradient `grad_nV` by its logits."""
    grad_hidden, grad_weight, grad_bias = gradients.hidden[k], gradients.weight[k], gradients.bias[k]
    weighted_nD, half = hidden_ND[tokens].to(grad_nV) * coefficients_n.unsqueeze(-1), inputs.half_dtype
    for tile in inputs.tiles:
        if grad_hidden is not None:
            add_product(grad_hidden[tokens], grad_nV[:, tile], inputs.heads[k].weight[tile], half, "hidden_gradient")
        if grad_weight is not None:
            add_product(grad_weight[tile], grad_nV[:, tile].T, weighted_nD, half, "weight_gradient")
    if grad_bias is not None:
        grad_bias[: inputs.vocab_size].addmv_(grad_nV.T, coefficients_n)
