"""The diagnostics of the fused loss head compared with those of whole logits."""

import pytest
import torch

from logitmix.loss_head import fused_log_probs
from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.mixing import mix_logits
from tests.helpers.loss_head import (
    V,
    both_schemes,
    gradients,
    known,
    leaves,
    plain,
    random_problem,
)


@both_schemes
@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.2, 0.5, 0.3]], ids=str)
@pytest.mark.parametrize("features", [{}, {"bias": True, "scale": 0.4}, {"softcap": 2.0}], ids=str)
def test_diagnostics_match_those_of_whole_logits(scheme, weights, features):
    hidden, heads, targets = random_problem(len(weights), rows=(0, 2, 1), **features)
    logits = [head.logits(h)[:, :V] for h, head in zip(hidden, heads, strict=True)]
    expected = mixture_diagnostics(logits, mix_logits(logits, weights, scheme), 0.8)
    found = []
    scores = fused_log_probs(
        hidden, heads, weights, targets, scheme, 0.8, coefficients=known(), diagnostics=found, chunk=3, tile=4
    )
    for parts, e in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), e)
    tensors = leaves(hidden, heads)
    plain_scores = plain(hidden, heads, weights, targets, scheme, 0.8, V)
    torch.testing.assert_close(gradients(scores, tensors), gradients(plain_scores, tensors))


def test_recomputing_in_the_backward_pass_adds_no_diagnostics():
    hidden, heads, targets = random_problem(2)
    found = []
    scores = fused_log_probs(hidden, heads, [0.5, 0.5], targets, diagnostics=found)
    gradients(scores, leaves(hidden, heads))
    assert len(found) == 1


def test_diagnostics_of_members_that_share_a_head():
    hidden, heads, targets = random_problem(1)
    hidden = [hidden[0], (hidden[0].detach() + 1).requires_grad_()]
    heads = heads * 2
    found, alone = [], plain(hidden, heads, [0.3, 0.7], targets)
    scores = fused_log_probs(hidden, heads, [0.3, 0.7], targets, diagnostics=found, coefficients=known())
    logits = [head.logits(h) for h, head in zip(hidden, heads, strict=True)]
    torch.testing.assert_close(tuple(found[0]), tuple(mixture_diagnostics(logits, mix_logits(logits, [0.3, 0.7]))))
    torch.testing.assert_close(gradients(scores, leaves(hidden, heads)), gradients(alone, leaves(hidden, heads)))
