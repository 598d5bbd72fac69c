"""Random students and teachers of the fused distillation loss, and the plain computation from whole logits."""

from dataclasses import replace

import torch
from torch import Tensor

from logitmix.loss_head.distillation import fused_divergence
from logitmix.loss_head.divergence import token_divergence
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import mix_logits
from tests.helpers.loss_head import random_problem, upstream

BETAS = (0.0, 0.3, 0.5, 1.0)


def random_distillation(num_members: int = 2, softcap: float | None = None, **options):
    """A student whose tensors require gradients, of another width than the members, and a frozen mixture."""
    (hidden, *_), (head, *_), _ = random_problem(1, softcap=softcap, **options, seed=1)
    teacher_hidden, teacher_heads, _ = random_problem(num_members, **options)
    return (
        hidden,
        head,
        [h.detach() for h in teacher_hidden],
        [
            replace(h, weight=h.weight.detach(), bias=None if h.bias is None else h.bias.detach())
            for h in teacher_heads
        ],
    )


def _frozen(head: Head) -> Head:
    return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


def student_leaves(problem) -> list[Tensor]:
    hidden, head, *_ = problem
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def plain_divergence(problem, weights, scheme="logit", beta=1.0, temperature=1.0, vocab_size=None):
    """The reference that `fused_divergence` documents, in float64."""
    hidden, head, teacher_hidden, teacher_heads = problem
    logits = [
        _double(h).logits(x.double()) for h, x in zip((head, *teacher_heads), (hidden, *teacher_hidden), strict=True)
    ]
    vocab_size = vocab_size or min(z.shape[-1] for z in logits)
    student, *teacher = (z[..., :vocab_size] for z in logits)
    return token_divergence(student, mix_logits(teacher, weights, scheme), beta, temperature)


def _double(head: Head) -> Head:
    return Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap)


def assert_divergence_agrees(problem, weights, tolerance: float = 1e-10, uniform: bool = False, **options) -> None:
    """Values and gradients are those of the reference, for a loss with a factor a token, or with one for all."""
    plain = {key: value for key, value in options.items() if key not in ("chunk", "tile")}
    expected, actual = plain_divergence(problem, weights, **plain), fused_divergence(*problem, weights, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
    tensors = student_leaves(problem)
    factors = torch.full((len(problem[0]),), 0.7) if uniform else upstream(len(problem[0]))
    grads = [torch.autograd.grad(x[0], tensors, factors.to(x[0])) for x in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance)
