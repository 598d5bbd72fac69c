"""Which gradients the fused loss head computes, in how many passes, in how much memory."""

from itertools import product

import pytest
import torch
from torch import Tensor

from logitmix.loss_head import clipped_coefficients, fused_log_probs
from tests.helpers.loss_head import (
    WIDTHS,
    N,
    assert_agree,
    both_schemes,
    gradients,
    known,
    leaves,
    passes,
    plain,
    random_problem,
    upstream,
)


@both_schemes
@pytest.mark.parametrize("frozen_head", [True, False])
def test_a_frozen_anchor_gets_no_gradient(monkeypatch, scheme, frozen_head):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    for x in (hidden[1], heads[1].weight, *([heads[0].weight] if frozen_head else [])):
        x.requires_grad_(False)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets, scheme, coefficients=known())
    gradients((log_probs, torch.zeros(())), leaves(hidden, heads))
    assert taken == [(True, False, not frozen_head, False, False, False)]


def test_coefficients_known_up_to_a_factor_need_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=lambda _, where: 8 * upstream()[where])
    expected = gradients(plain(hidden, heads, [0.5, 0.5], targets), tensors)
    torch.testing.assert_close(gradients(scores, tensors), expected)
    assert len(taken) == 1


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_wrong_coefficients_cost_a_second_pass(monkeypatch, wrong):
    taken = passes(monkeypatch)
    problem = random_problem(2)
    assert_agree(problem, [0.5, 0.5], coefficients=lambda log_probs, where: torch.full_like(log_probs, wrong))
    assert len(taken) == 2


def test_with_frozen_heads_any_loss_needs_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    for head in heads:
        head.weight.requires_grad_(False)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets)
    of_a_sequence = torch.autograd.grad(log_probs.mean().exp(), hidden)
    expected = torch.autograd.grad(plain(hidden, heads, [0.5, 0.5], targets)[0].mean().exp(), hidden)
    torch.testing.assert_close(of_a_sequence, expected)
    assert len(taken) == 1


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    log_probs, _ = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=known())
    first = torch.autograd.grad(log_probs, tensors, upstream(), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(log_probs, tensors, upstream()), first)


def test_no_graph_without_gradients(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    with torch.no_grad():
        scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, coefficients=known())
    assert not any(score.requires_grad for score in scores)
    assert not any(taken[0])


@both_schemes
@pytest.mark.parametrize("coefficients", [None, known(64)], ids=["recomputed", "in the forward pass"])
def test_no_tensor_has_the_size_of_all_logits(scheme, coefficients):
    tokens, vocab, chunk = 64, 50, 4
    hidden, heads, targets = random_problem(2, tokens=tokens, vocab=vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        log_probs, _ = fused_log_probs(
            hidden, heads, [0.5, 0.5], targets, scheme, coefficients=coefficients, chunk=chunk
        )
        gradients((log_probs, torch.zeros(())), leaves(hidden, heads))
    assert largest <= max(tokens, vocab) * max(WIDTHS)  # the size of a gradient
    assert largest < tokens * vocab


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.1, 0.4), (0.0, 0.3)])
@pytest.mark.parametrize("is_first_update", [True, False])
def test_coefficients_are_the_derivative_of_the_clipped_objective(epsilons, is_first_update):
    low, high = epsilons
    old, advantages = torch.tensor(
        list(product(torch.linspace(-1, 1, 41).tolist(), [-1.3, -0.2, 0.0, 0.7, 2.0])), dtype=torch.float64
    ).unbind(1)
    log_probs = (torch.zeros_like(old) - 0.013).requires_grad_()
    if is_first_update:
        old = log_probs.detach()
    ratio = (log_probs - old).exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    (expected,) = torch.autograd.grad(loss.sum(), log_probs)
    actual = clipped_coefficients(log_probs.detach(), advantages, None if is_first_update else old, low, high)
    torch.testing.assert_close(actual, expected)


def test_an_off_policy_loss_needs_one_pass(monkeypatch):
    taken = passes(monkeypatch)
    hidden, heads, targets = random_problem(2)
    tensors = leaves(hidden, heads)
    advantages = upstream()
    old = plain(hidden, heads, [0.5, 0.5], targets)[0].detach() + torch.linspace(-0.5, 0.5, N, dtype=torch.float64)

    def loss(log_probs: Tensor) -> Tensor:
        ratio = (log_probs - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    log_probs, _ = fused_log_probs(
        hidden, heads, [0.5, 0.5], targets, chunk=2,
        coefficients=lambda lp, where: clipped_coefficients(lp, advantages[where], old[where]),
    )  # fmt: skip
    expected = torch.autograd.grad(loss(plain(hidden, heads, [0.5, 0.5], targets)[0]), tensors)
    torch.testing.assert_close(torch.autograd.grad(loss(log_probs), tensors), expected)
    assert len(taken) == 1
