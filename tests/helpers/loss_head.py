"""Random inputs of the fused loss head, and the plain computation from whole logits.

Shape legend: K members, N tokens, V vocabulary, D width.
"""

import pytest
import torch
from torch import Tensor

from logitmix.loss_head import fused_log_probs, log_probs
from logitmix.mixture.head import Head
from logitmix.mixture.logprobs import log_probs_and_entropy
from logitmix.mixture.mixing import SCHEMES, mix_logits

N, V, WIDTHS = 7, 11, (5, 3, 4)
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def random_problem(
    num_members: int = 2,
    *,
    tokens: int = N,
    vocab: int = V,
    rows: tuple[int, ...] = (0, 0, 0),
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], list[Head], Tensor]:
    """Hidden states, heads of different widths with `rows` of padding beyond the vocabulary, and targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = [draw(tokens, WIDTHS[k]) for k in range(num_members)]
    heads = [
        Head(draw(vocab + rows[k], WIDTHS[k]), draw(vocab + rows[k]) if bias else None, scale, softcap)
        for k in range(num_members)
    ]
    return hidden, heads, torch.randint(vocab, (tokens,), generator=generator)


def leaves(hidden: list[Tensor], heads: list[Head]) -> list[Tensor]:
    tensors = [*hidden, *(head.weight for head in heads), *(head.bias for head in heads if head.bias is not None)]
    return [x for x in dict.fromkeys(tensors) if x.requires_grad]


def plain(hidden, heads, weights, targets, scheme="logit", temperature=1.0, vocab_size=None):
    """The reference that `fused_log_probs` documents, in float64."""
    logits = [
        Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap).logits(
            h.double()
        )
        for h, head in zip(hidden, heads, strict=True)
    ]
    vocab_size = vocab_size or min(z.shape[-1] for z in logits)
    mixed = mix_logits([z[..., :vocab_size] for z in logits], weights, scheme)
    return log_probs_and_entropy(mixed, targets, temperature)


def upstream(tokens: int = N) -> Tensor:
    return torch.linspace(-1.5, 2.0, tokens, dtype=torch.float64)


def gradients(scores: tuple[Tensor, Tensor], tensors: list[Tensor], of_entropy: float = 0.0) -> list[Tensor]:
    log_probs, entropy = scores
    loss = (log_probs * upstream(len(log_probs)).to(log_probs)).sum()
    if of_entropy:
        loss = loss + of_entropy * (entropy * upstream(len(log_probs)).to(log_probs).flip(0)).sum()
    return list(torch.autograd.grad(loss, tensors, materialize_grads=True))


def known(tokens: int = N):
    return lambda log_probs, where: upstream(tokens).to(log_probs)[where]


def assert_agree(problem, weights, tolerance: float = 1e-10, of_entropy: float = 0.0, **kwargs) -> None:
    hidden, heads, targets = problem
    options = {key: value for key, value in kwargs.items() if key not in ("chunk", "tile", "coefficients")}
    expected = plain(hidden, heads, weights, targets, **options)
    actual = fused_log_probs(hidden, heads, weights, targets, **kwargs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    tensors = leaves(hidden, heads)
    for a, e in zip(gradients(actual, tensors, of_entropy), gradients(expected, tensors, of_entropy), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)


def passes(monkeypatch) -> list[tuple[bool, ...]]:
    """A list to which each pass over the vocabulary appends the gradients that it computes."""
    taken = []
    run = log_probs.run_passes

    def counted(inputs, tensors, needs_grad, *args):
        taken.append(tuple(needs_grad))
        return run(inputs, tensors, needs_grad, *args)

    monkeypatch.setattr(log_probs, "run_passes", counted)
    return taken
