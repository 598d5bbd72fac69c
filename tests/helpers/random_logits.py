"""Logits of members, drawn from a seed, and the distribution of their mixture by definition."""

import math

import torch
from torch import Tensor


def draw_logits(
    shape: tuple[int, ...], num_members: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """The same in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(num_members)]


def naive_probs(logits: list[Tensor], weights: list[float], scheme: str) -> Tensor:
    """Products of powers of the probabilities, or weighted sums, in float64."""
    probs = [z.double().exp() / z.double().exp().sum(-1, keepdim=True) for z in logits]
    if scheme == "prob":
        return sum(w * p for w, p in zip(weights, probs, strict=True))
    product = math.prod(p**w for w, p in zip(weights, probs, strict=True))
    return product / product.sum(-1, keepdim=True)
