"""The general pass of the fused loss head: any scheme, soft caps, and the gradient through the entropy.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, D width of a member's hidden states.
"""

import torch
from torch import Tensor

from logitmix.loss_head.chunking import Gradients, LossHeadInputs, add_product, multiply
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.log_probs import log_probs_and_entropy
from logitmix.mixture.mixing import mix_logits


def run_general(
    inputs: LossHeadInputs,
    hidden: list[Tensor],
    scores: Tensor,
    gradients: Gradients,
    grad_scores: tuple[Tensor, Tensor] | None,
) -> None:
    """Whole rows of the vocabulary. The heads' products are ours, what follows up to the scores is autograd's."""
    wants = [
        any(g is not None for g in (gradients.hidden[k], gradients.weight[k], gradients.bias[k]))
        for k in range(len(hidden))
    ]
    # in rows of logits, what a member takes with autograd's intermediate results: about 6 with a gradient, 3 without
    for tokens in inputs.chunks(inputs.vocab_size * (3 * len(hidden) + 3 * sum(wants)), least=32):
        raw = [_raw_logits(inputs, head, h[tokens], scores) for head, h in zip(inputs.heads, hidden, strict=True)]
        leaves = [z.requires_grad_() for z, want in zip(raw, wants, strict=True) if want]
        weights = inputs.weights if inputs.weights.dim() == 1 else inputs.weights[tokens]
        with torch.set_grad_enabled(any(wants)):
            logits = [head.transform(z) for head, z in zip(inputs.heads, raw, strict=True)]
            mixed = mix_logits(logits, weights, inputs.scheme)
            chunk_scores = log_probs_and_entropy(mixed, inputs.targets_N[tokens], inputs.temperature)
        if inputs.diagnostics is not None:
            inputs.diagnostics.append(mixture_diagnostics(logits, mixed, inputs.temperature))
        del logits, mixed
        for out, score in zip(scores, chunk_scores, strict=True):
            out[tokens] = score.detach()
        if not leaves:
            continue
        ones_n = torch.ones_like(scores[0, tokens])
        upstream = (ones_n, torch.zeros_like(ones_n)) if grad_scores is None else tuple(g[tokens] for g in grad_scores)
        slopes = iter(torch.autograd.grad(chunk_scores, leaves, upstream))
        coefficients_n = ones_n
        if gradients.of_heads and grad_scores is None:
            assert inputs.coefficients is not None
            coefficients_n = inputs.coefficients(scores[0, tokens], tokens).to(ones_n)
        for k, want in enumerate(wants):
            if want:
                _add_gradients(inputs, k, next(slopes), hidden[k], tokens, coefficients_n, gradients)


def _raw_logits(inputs: LossHeadInputs, head: Head, hidden_nD: Tensor, like: Tensor) -> Tensor:
    """The head's products and bias `[n, V]`, in the dtype of `like`."""
    z_nV = like.new_empty(len(hidden_nD), inputs.vocab_size)
    for tile in inputs.tiles:
        z_nV[:, tile] = multiply(hidden_nD, head.weight[tile].T, like.dtype, inputs.half)
    return z_nV if head.bias is None else z_nV.add_(head.bias[: inputs.vocab_size])


def _add_gradients(
    inputs: LossHeadInputs,
    k: int,
    slope_nV: Tensor,
    hidden_ND: Tensor,
    tokens: slice,
    coefficients_n: Tensor,
    gradients: Gradients,
) -> None:
    by_hidden, by_weight, by_bias = gradients.hidden[k], gradients.weight[k], gradients.bias[k]
    weighted_nD = hidden_ND[tokens].to(slope_nV) * coefficients_n.unsqueeze(-1)
    for tile in inputs.tiles:
        if by_hidden is not None:
            add_product(by_hidden[tokens], slope_nV[:, tile], inputs.heads[k].weight[tile], inputs.half)
        if by_weight is not None:
            add_product(by_weight[tile], slope_nV[:, tile].T, weighted_nD, inputs.half)
    if by_bias is not None:
        by_bias[: inputs.vocab_size].addmv_(slope_nV.T, coefficients_n)
