"""Properties of `mix_logits` for random members and weights.

Shape legend: K members, V vocabulary.
"""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitmix.mixture.mixing import SCHEMES, mix_logits

finite = st.floats(-30, 30, allow_nan=False, width=32)
property_test = partial(settings, deadline=None, max_examples=60, derandomize=True)()


@st.composite
def mixtures(draw, positive: bool):
    """K members `[1, V]` and K weights: a distribution over the members if `positive`, else any real numbers."""
    num_members, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    row = st.lists(finite, min_size=vocabulary, max_size=vocabulary)
    logits = [torch.tensor([draw(row)], dtype=torch.float64) for _ in range(num_members)]
    lowest = 0.0 if positive else -2.0
    raw = draw(st.lists(st.floats(lowest, 2.0), min_size=num_members, max_size=num_members))
    if positive and sum(raw) < 0.01:
        raw[0] = 1.0
    weights = torch.tensor(raw, dtype=torch.float64)
    return logits, weights / weights.sum() if positive else weights


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES), st.lists(finite, min_size=4, max_size=4))
def test_a_constant_added_to_a_members_logits_changes_nothing(mixture, scheme, constants):
    logits, weights = mixture
    shifted = [z + c for z, c in zip(logits, constants, strict=False)]
    close(mix_logits(shifted, weights, scheme).softmax(-1), mix_logits(logits, weights, scheme).softmax(-1))


@property_test
@given(mixtures(positive=False), st.lists(finite, min_size=4, max_size=4))
def test_translation_invariance_holds_for_any_real_weights(mixture, constants):
    logits, weights = mixture
    shifted = [z + c for z, c in zip(logits, constants, strict=False)]
    close(mix_logits(shifted, weights).softmax(-1), mix_logits(logits, weights).softmax(-1))


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES), st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(mixture, scheme, random):
    logits, weights = mixture
    order = list(range(len(logits)))
    random.shuffle(order)
    permuted = mix_logits([logits[k] for k in order], weights[order], scheme)
    close(permuted, mix_logits(logits, weights, scheme))


@property_test
@given(mixtures(positive=True))
def test_prob_lies_between_its_members(mixture):
    logits, weights = mixture
    probs_K1V = torch.stack([z.softmax(-1) for z in logits])
    mixed = mix_logits(logits, weights, "prob").exp()
    assert (mixed <= probs_K1V.amax(0) + 1e-9).all()
    assert (mixed >= probs_K1V.amin(0) - 1e-9).all()


@property_test
@given(mixtures(positive=True))
def test_logit_lies_between_its_members_up_to_the_normaliser(mixture):
    """Hölder: the geometric mean's normaliser is at most 1, so its log-probabilities are at least the smaller ones."""
    logits, weights = mixture
    log_probs_K1V = torch.stack([z.log_softmax(-1) for z in logits])
    mixed = mix_logits(logits, weights).log_softmax(-1)
    assert (mixed >= log_probs_K1V.amin(0) - 1e-9).all()


@property_test
@given(mixtures(positive=True), st.sampled_from(SCHEMES))
def test_a_member_split_in_two_is_the_same_mixture(mixture, scheme):
    logits, weights = mixture
    halves = torch.cat([weights[:1] / 2, weights[:1] / 2, weights[1:]])
    close(mix_logits([logits[0], *logits], halves, scheme), mix_logits(logits, weights, scheme))
