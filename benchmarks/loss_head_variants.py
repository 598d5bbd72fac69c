"""The losses that `loss_head.py` compares: the fused loss head, and the heads of other libraries.

Each variant computes the loss of eq. 6 from the hidden states and heads in `Inputs`. "Concatenated" variants are heads
for one model, given the concatenated hidden states and heads of both members.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from logitmix.loss_head import clipped_coefficients, fused_log_probs
from logitmix.mixture.head import Head

SEQUENCE = 512  # tokens of a completion, the paper's limit; Liger's head processes one at a time
BETA = 0.01


class Inputs:
    def __init__(self, tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(0, scale, generator=generator)

        self.policy, self.anchor = normal(tokens, width).requires_grad_(), normal(tokens, width)
        self.policy_head = normal(vocab, width, scale=width**-0.5).requires_grad_()
        self.anchor_head = normal(vocab, width, scale=width**-0.5)
        self.targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
        self.advantages = torch.randn(tokens, device=device, generator=generator)
        self.both: Tensor | None = None

    def concatenate(self) -> None:
        """Concatenate the members: one head whose product is the mixture's logits."""
        self.both = torch.cat([0.5 * self.policy.detach(), 0.5 * self.anchor], 1).requires_grad_()
        self.both_heads = torch.cat([self.policy_head.detach(), self.anchor_head], 1).requires_grad_()

    def forget_gradients(self) -> None:
        for x in (self.policy, self.policy_head, self.both, getattr(self, "both_heads", None)):
            if x is not None:
                x.grad = None

    def loss(self, log_probs: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The loss of the first update after a rollout, whose ratio is 1; with a KL to the `anchor`'s log-probs."""
        loss = -(log_probs - log_probs.detach()).exp() * self.advantages
        if anchor is not None:
            gap = anchor - log_probs
            loss = loss + BETA * (gap.exp() - gap - 1)
        return loss.mean()


def naive(x: Inputs) -> Tensor:
    policy, anchor = x.policy @ x.policy_head.T, x.anchor @ x.anchor_head.T  # as the members' forwards return them
    mixed = 0.5 * policy + 0.5 * anchor
    return x.loss(mixed.float().log_softmax(-1).gather(-1, x.targets.unsqueeze(-1)).squeeze(-1))


def trl_concatenated(x: Inputs) -> Tensor:
    return x.loss(trl(x.both, x.both_heads, x.targets))


def trl_single(x: Inputs) -> Tensor:
    return x.loss(trl(x.policy, x.policy_head, x.targets))


def trl(hidden: Tensor | None, head: Tensor, targets: Tensor) -> Tensor:
    log_probs: Tensor = ChunkedLogProbFunction.apply(
        hidden, head, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )[0]
    return log_probs


def liger_concatenated(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    assert x.both is not None
    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", temperature=1.0)
    shape = (-1, SEQUENCE)
    mask = torch.ones_like(x.targets).view(shape)
    loss: Tensor = head(
        x.both.view(*shape, x.both.shape[-1]),
        x.both_heads,
        x.targets.view(shape),
        mask,
        x.advantages.view(shape)[:, 0],
    )[0]
    return loss


def fused(x: Inputs) -> Tensor:
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    log_probs, _ = fused_log_probs(
        [x.policy, x.anchor], heads, [0.5, 0.5], x.targets,
        coefficients=lambda log_probs, tokens: clipped_coefficients(log_probs, x.advantages[tokens]),
    )  # fmt: skip
    return x.loss(log_probs)


def fused_again(x: Inputs) -> Tensor:
    """Without coefficients, as for a loss of whole sequences: the backward pass recomputes the chunks."""
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    return x.loss(fused_log_probs([x.policy, x.anchor], heads, [0.5, 0.5], x.targets)[0])


def fused_prob(x: Inputs) -> Tensor:
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    log_probs, _ = fused_log_probs(
        [x.policy, x.anchor], heads, [0.5, 0.5], x.targets, "prob",
        coefficients=lambda log_probs, tokens: clipped_coefficients(log_probs, x.advantages[tokens]),
    )  # fmt: skip
    return x.loss(log_probs)


def fused_single_kl(x: Inputs) -> Tensor:
    """Canonical GRPO with the same head: the anchor's log-probs, then the policy's with the KL to them."""
    with torch.no_grad():
        anchor, _ = fused_log_probs([x.anchor], [Head(x.anchor_head)], [1.0], x.targets)

    def coefficients(log_probs: Tensor, tokens: slice) -> Tensor:
        return clipped_coefficients(log_probs, x.advantages[tokens]) + BETA * (1 - (anchor[tokens] - log_probs).exp())

    log_probs, _ = fused_log_probs([x.policy], [Head(x.policy_head)], [1.0], x.targets, coefficients=coefficients)
    return x.loss(log_probs, anchor)


def fused_shared(x: Inputs) -> Tensor:
    head = Head(x.policy_head.detach())
    return x.loss(fused_log_probs([x.policy, x.anchor], [head, head], [0.5, 0.5], x.targets)[0])


def products(x: Inputs) -> Tensor:
    """Only the four matrix products of two members with a trained head."""
    hidden, head = x.policy.detach(), x.policy_head.detach()
    tokens = len(hidden)
    size = min(tokens, 256 if hidden.device.type == "cpu" else 2048)
    z = hidden.new_empty(size, len(head))
    x.policy.grad, x.policy_head.grad = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        torch.mm(hidden[part], head.T, out=z)
        z.addmm_(x.anchor[part], x.anchor_head.T)
        torch.mm(z, head, out=x.policy.grad[part])
        x.policy_head.grad.addmm_(z.T, hidden[part])
    return torch.zeros(()).requires_grad_()


Variant = Callable[[Inputs], Tensor]
VARIANTS: dict[str, tuple[str, Variant]] = {
    "naive": ("naive mixture", naive),
    "trl": ("TRL's chunked head, concatenated", trl_concatenated),
    "trl_single": ("TRL's chunked head, single policy, beta = 0", trl_single),
    "liger": ("Liger's fused linear GRPO, concatenated", liger_concatenated),
    "fused": ("**logitmix**", fused),
    "single_kl": ("logitmix, single policy with KL", fused_single_kl),
    "shared": ("logitmix, one frozen head of both members", fused_shared),
    "again": ("logitmix, recomputed in the backward pass", fused_again),
    "prob": ("logitmix, scheme prob", fused_prob),
    "products": ("the four matrix products alone, `torch.mm`", products),
}
CONCATENATED = ("trl", "liger")


def available(name: str) -> bool:
    return name != "liger" or importlib.util.find_spec("liger_kernel") is not None
