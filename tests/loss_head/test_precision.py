"""The accuracy of the fused loss head in half precision, under autocast and at extreme logits."""

import math

import pytest
import torch

from logitmix.loss_head import fused_log_probs
from logitmix.mixture.head import Head
from logitmix.mixture.logprobs import log_probs_and_entropy
from logitmix.mixture.mixing import mix_logits
from tests.helpers.loss_head import (
    both_schemes,
    gradients,
    known,
    leaves,
    plain,
    random_problem,
)


@both_schemes
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_is_as_accurate_as_the_plain_computation(scheme, seed):
    tokens, vocab = 64, 300
    hidden, heads, targets = random_problem(2, tokens=tokens, vocab=vocab, dtype=torch.bfloat16, seed=seed)
    tensors = leaves(hidden, heads)
    truth = plain(hidden, heads, [0.5, 0.5], targets, scheme)
    logits = [head.logits(h) for h, head in zip(hidden, heads, strict=True)]
    in_bf16 = log_probs_and_entropy(mix_logits(logits, [0.5, 0.5], scheme), targets)
    found = fused_log_probs(hidden, heads, [0.5, 0.5], targets, scheme, coefficients=known(tokens))
    assert all(score.dtype == torch.float32 for score in found)
    true, fused, half = (
        [*(score.detach() for score in scores), *gradients(scores, tensors)] for scores in (truth, found, in_bf16)
    )
    for t, o, b in zip(true, fused, half, strict=True):
        assert (o.double() - t.double()).norm() <= 1.02 * (b.double() - t.double()).norm()


def test_a_token_of_probability_near_1_keeps_its_gradient():
    hidden = torch.ones(1, 1, requires_grad=True)
    head = Head(torch.tensor([[25.0], [0.0]]))
    log_probs, _ = fused_log_probs([hidden], [head], [1.0], torch.tensor([0]))
    log_probs.sum().backward()
    torch.testing.assert_close(log_probs.item(), -math.exp(-25), rtol=1e-5, atol=0)  # a plain log_softmax gives 0
    torch.testing.assert_close(hidden.grad.item(), 25 * math.exp(-25), rtol=1e-5, atol=0)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = Head(torch.tensor([[1.0], [0.5], [-1.0]]).requires_grad_())
    scores = fused_log_probs([hidden], [head], [1.0], torch.tensor([1, 1]), tile=1, coefficients=known(2))
    torch.testing.assert_close(scores[0].detach(), torch.tensor([-5e3, -1.5e4]))
    torch.testing.assert_close(scores[1].detach(), torch.zeros(2))
    assert all(torch.isfinite(g).all() for g in gradients(scores, [hidden, head.weight]))


def test_autocast_changes_nothing():
    hidden, heads, targets = random_problem(2, dtype=torch.float32)
    expected = fused_log_probs(hidden, heads, [0.5, 0.5], targets)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused_log_probs(hidden, heads, [0.5, 0.5], targets), expected, rtol=0, atol=0)
