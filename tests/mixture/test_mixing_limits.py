"""`mix_logits` at its numerical limits: underflow, half precision, tokens ruled out, weights of 0.

Shape legend: K members, B batch, T time, V vocabulary.
"""

import math
from functools import partial

import pytest
import torch

from logitmix.mixture.mixing import SCHEMES, alpha_to_weights, mix_logits
from tests.helpers.random_logits import draw_logits, naive_probs

INF = torch.inf
B, T, V = 3, 4, 7
random_logits = partial(draw_logits, (B, T, V))
both_schemes = pytest.mark.parametrize("scheme", SCHEMES)


def test_prob_does_not_underflow_where_the_other_member_has_mass():
    policy = torch.tensor([[0.0, -1e4, -1e4]])
    anchor = torch.tensor([[-1e4, 0.0, -1e4]])
    expected = torch.tensor([[math.log(0.75), math.log(0.25), -1e4]])
    for weights in ([0.75, 0.25], [[0.75, 0.25]]):
        torch.testing.assert_close(mix_logits([policy, anchor], weights, "prob"), expected)


def test_logit_at_large_logits_stays_finite():
    policy, anchor = torch.tensor([[0.0, -1e4, -1e4]]), torch.tensor([[-1e4, 0.0, -1e4]])
    log_probs = mix_logits([policy, anchor], [0.5, 0.5]).log_softmax(-1)
    torch.testing.assert_close(log_probs, torch.tensor([[-math.log(2), -math.log(2), -5000 - math.log(2)]]))


def test_prob_at_a_weight_too_small_for_float32_probabilities():
    policy, anchor = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    for weights in (alpha_to_weights(1e-30), alpha_to_weights([1e-30])):
        mixed = mix_logits([policy, anchor], weights, "prob")
        torch.testing.assert_close(mixed, torch.tensor([[0.0, math.log(1e-30)]]))


@both_schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_mixed_in_float32(scheme, dtype):
    logits = random_logits(2, dtype)
    mixed = mix_logits(logits, [0.35, 0.65], scheme)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mix_logits([z.float() for z in logits], [0.35, 0.65], scheme))
    torch.testing.assert_close(
        mixed.double().softmax(-1), naive_probs(logits, [0.35, 0.65], scheme), rtol=1e-5, atol=1e-7
    )


def test_one_float64_member_makes_the_mixture_float64():
    policy, anchor = random_logits()
    assert mix_logits([policy.float(), anchor], [0.5, 0.5]).dtype == torch.float64


RULED_OUT = [
    # policy's logits, anchor's logits, probabilities at alpha = 1/2 (logit), (prob)
    ([0.0, 0.0, -INF], [0.0, 0.0, 0.0], [1 / 2, 1 / 2, 0.0], [5 / 12, 5 / 12, 1 / 6]),
    ([0.0, 0.0, 0.0], [-INF, 0.0, 0.0], [0.0, 1 / 2, 1 / 2], [1 / 6, 5 / 12, 5 / 12]),
    ([0.0, 0.0, -INF], [0.0, 0.0, -INF], [1 / 2, 1 / 2, 0.0], [1 / 2, 1 / 2, 0.0]),
    ([0.0, 0.0, -INF], [0.0, -INF, -INF], [1.0, 0.0, 0.0], [3 / 4, 1 / 4, 0.0]),
]


@both_schemes
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("policy", "anchor", "by_logit", "by_prob"), RULED_OUT)
def test_tokens_ruled_out_by_one_member_or_both(policy, anchor, by_logit, by_prob, scheme, by_row):
    members = [torch.tensor([z], dtype=torch.float64, requires_grad=True) for z in (policy, anchor)]
    weights = alpha_to_weights([0.5] if by_row else 0.5)
    log_probs = mix_logits(members, weights, scheme).log_softmax(-1)
    expected = torch.tensor([by_logit if scheme == "logit" else by_prob], dtype=torch.float64)
    torch.testing.assert_close(log_probs.exp(), expected)

    log_probs[0, 0 if expected[0, 0] > 0 else 1].backward()
    for member in members:
        assert torch.isfinite(member.grad).all()
        assert (member.grad[torch.isneginf(member)] == 0).all()


@both_schemes
@pytest.mark.parametrize("bad", [INF, -INF, torch.nan])
def test_a_member_of_weight_0_is_ignored(scheme, bad):
    policy, anchor = random_logits(dtype=torch.float32)
    anchor[0] = bad
    members = [policy.requires_grad_(), anchor.requires_grad_()]

    mixed = mix_logits([members[0][:1], members[1][:1]], [1.0, 0.0], scheme)  # weight 0 for the whole batch
    torch.testing.assert_close(mixed.softmax(-1), policy[:1].softmax(-1))

    mixed = mix_logits(members, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], scheme)  # weight 0 in the broken row
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1))
    torch.testing.assert_close(mixed[2].softmax(-1), anchor[2].softmax(-1))
    mixed.log_softmax(-1)[..., 0].sum().backward()
    assert torch.isfinite(policy.grad).all()
    assert torch.isfinite(anchor.grad).all()
    assert (anchor.grad[0] == 0).all()
    assert (policy.grad[2] == 0).all()
    assert (policy.grad[:2] != 0).any(-1).all()


@both_schemes
@pytest.mark.parametrize("bad", [INF, -INF, torch.nan])
@pytest.mark.parametrize("shape", [(3, V), (3, T, V)])
def test_rows_of_weight_0_without_gradients(scheme, bad, shape):
    """As in decoding: the values match those with gradients, and the members' logits are not modified."""
    policy, anchor = torch.randn(2, *shape)
    policy[2], anchor[0], anchor[1, ..., 0], policy[1, ..., 0] = bad, bad, -INF, -INF
    before = [policy.clone(), anchor.clone()]
    weights = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    mixed = mix_logits([policy, anchor], weights, scheme)
    for member, copy in zip((policy, anchor), before, strict=True):
        torch.testing.assert_close(member, copy, rtol=0, atol=0, equal_nan=True)
    with_gradients = mix_logits([policy.requires_grad_(), anchor.requires_grad_()], weights, scheme)
    torch.testing.assert_close(mixed, with_gradients.detach(), rtol=0, atol=0)
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1).detach())
    torch.testing.assert_close(mixed[2].softmax(-1), anchor[2].softmax(-1).detach())
    assert (mixed[1].softmax(-1)[..., 0] == 0).all()


@both_schemes
def test_a_weight_that_is_0_in_float32_is_ignored(scheme):
    policy, anchor = random_logits(dtype=torch.float32)[:2]
    anchor[0] = -INF
    weights = [[1.0, 1e-50]] + [[0.5, 0.5]] * (B - 1)
    mixed = mix_logits([policy, anchor], weights, scheme)
    torch.testing.assert_close(mixed[0].softmax(-1), policy[0].softmax(-1))


def test_all_weights_0_is_the_uniform_distribution():
    logits = random_logits(dtype=torch.bfloat16)
    for weights in ([0.0, 0.0], [[0.0, 0.0]] * B):
        mixed = mix_logits(logits, weights)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, torch.zeros(B, T, V))
