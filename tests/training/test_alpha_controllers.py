"""The alpha controllers against closed forms, and over 200 steps."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from logitmix.training.alpha.controllers import (
    Counts,
    adaptive,
    cosine,
    linear,
    parse_points,
    piecewise,
    sigmoid,
    standardised_gain,
    validation_weighted,
)


def counts(policy: int, mixture: int, anchor: int | None = None, n: int = 100, both: int = 0) -> Counts:
    """Counts where the policy answers `policy` questions, the mixture `mixture`, and both answer `both`."""
    return Counts(n, policy, mixture, policy - both, mixture - both, anchor)


def test_equation_9():
    now = counts(policy=40, mixture=62, both=30)
    assert (now.forgetting, now.gain) == (10, 32)
    assert standardised_gain(now, 25, 35) == (32 - 10 - 25) / 35
    assert adaptive(now, 25, 35) == pytest.approx(1 / (1 + math.exp(3 / 35)))


@pytest.mark.parametrize(("gain", "expected"), [(0, 0.329), (25, 0.5), (100, 0.895), (-100, 0.027)])
def test_eq_9_at_the_papers_values(gain, expected):
    """(c_o, c_d, |D_val|) = (25, 35, 100), at a net gain of nothing, the offset, all and minus all."""
    now = counts(policy=max(0, -gain), mixture=max(0, gain))
    assert adaptive(now, 25, 35) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("x", [-1e308, -800.0, -40.0, -1.0, 0.0, 0.7, 36.0, 1e308])
def test_the_sigmoid_never_overflows(x):
    expected = 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
    assert sigmoid(x) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_eq_9_without_gain_settles_at_once():
    alpha = 0.9
    for _ in range(200):
        alpha = adaptive(counts(policy=50, mixture=50, both=50), 25, 35)
        assert alpha == pytest.approx(0.3287, abs=1e-4)


@pytest.mark.parametrize("slope", [-100, -40, 40, 100])
def test_eq_9_in_a_loop_with_the_gain_settles_where_it_should(slope):
    """A net gain of at most 100 questions that rises or falls with alpha: |d alpha'/d alpha| <= 100 / (4 * 35) < 1.

    So there is one fixed point, and 200 steps from either end reach it. Counts are whole questions, which leaves
    alpha within half a question of it: 0.5 / (4 * 35 * (1 - 100 / 140)) = 0.0125.
    """
    ends = []
    for alpha in (0.0, 1.0):
        for _ in range(200):
            gain = round(slope * (alpha if slope > 0 else alpha - 1))
            alpha = adaptive(counts(policy=0, mixture=gain), 25, 35)
        ends.append(alpha)
    fixed_point = 0.5
    for _ in range(1000):
        fixed_point = sigmoid((slope * (fixed_point if slope > 0 else fixed_point - 1) - 25) / 35)
    assert ends == pytest.approx([fixed_point] * 2, abs=0.0125)


def test_eq_9_under_noise_follows_the_gain_and_stays_in_its_range():
    """Binomial counts around accuracies 0.4 and 0.6: alpha moves around its mean, and neither drifts nor sticks."""
    draw = random.Random(0)
    alphas = []
    for _ in range(200):
        policy = [draw.random() < 0.4 for _ in range(100)]
        mixture = [draw.random() < 0.6 for _ in range(100)]
        gain = sum(m and not p for p, m in zip(policy, mixture, strict=True))
        forgetting = sum(p and not m for p, m in zip(policy, mixture, strict=True))
        alphas.append(adaptive(Counts(100, sum(policy), sum(mixture), forgetting, gain), 25, 35))
    assert 0.027 <= min(alphas) < max(alphas) <= 0.895
    assert np.mean(alphas) == pytest.approx(sigmoid((20 - 25) / 35), abs=0.01)
    assert np.mean(alphas[:100]) == pytest.approx(np.mean(alphas[100:]), abs=0.02)


def test_validation_weighted_written_out():
    weights = np.exp(np.array([0.4, 0.6, 0.5]) / 0.25)
    weights /= weights.sum()
    expected = 0.5 * 0.3 + 0.5 * (weights[1] * 0.3 + weights[2])
    assert validation_weighted(0.3, counts(40, 60, anchor=50)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("accuracies", "limit"), [((50, 50, 50), 0.5), ((20, 60, 45), None), ((80, 60, 10), None)])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.95])
def test_validation_weighted_settles_at_the_anchors_share_against_the_policy(accuracies, limit, start):
    policy, mixture, anchor = accuracies
    alpha = start
    for _ in range(200):
        alpha = validation_weighted(alpha, counts(policy, mixture, anchor))
    share = 1 / (1 + math.exp((policy - anchor) / 100 / 0.25))
    assert alpha == pytest.approx(share if limit is None else limit, abs=1e-9)


@pytest.mark.parametrize(("policy", "anchor", "limit"), [(100, 0, 0.05), (0, 100, 0.95)])
def test_validation_weighted_stays_within_its_clip(policy, anchor, limit):
    alpha = 0.5
    for _ in range(200):
        alpha = validation_weighted(alpha, counts(policy, 0, anchor))
        assert 0.05 <= alpha <= 0.95
    assert alpha == pytest.approx(limit)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_schedules_go_from_start_to_end_and_never_back(schedule):
    values = [schedule(step / 200, 0.8, 0.1) for step in range(201)]
    assert (values[0], values[100], values[-1]) == pytest.approx((0.8, 0.45, 0.1))
    assert all(a > b for a, b in pairwise(values))


def test_the_linear_schedule_is_a_line_and_the_cosine_half_a_wave():
    for progress in (0.1, 0.25, 0.9):
        assert linear(progress, 0.8, 0.1) == pytest.approx(0.8 - 0.7 * progress)
        assert cosine(progress, 0.8, 0.1) == pytest.approx(0.45 + 0.35 * math.cos(math.pi * progress))


def test_piecewise_is_linear_interpolation():
    points = [(10, 0.5), (20, 0.1), (21, 0.9)]
    steps = range(30)
    expected = np.interp(steps, [10, 20, 21], [0.5, 0.1, 0.9])
    assert [piecewise(step, points) for step in steps] == pytest.approx(expected.tolist())


def test_points_are_read_as_step_and_alpha():
    assert parse_points(["3:0.5", "100:0"]) == [(3, 0.5), (100, 0.0)]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "alpha_points is empty"),
        (["0.5"], "'0.5' in alpha_points is not STEP:ALPHA; write 100:0.2"),
        (["a:0.5"], "not STEP:ALPHA"),
        (["1.5:0.5"], "not STEP:ALPHA"),
        (["3:"], "not STEP:ALPHA"),
        (["3:1"], "'3:1' in alpha_points has alpha 1; training needs 0 <= alpha < 1"),
        (["3:nan"], "alpha nan"),
        (["3:-0.1"], "alpha -0.1"),
        (["5:0.1", "5:0.2"], r"steps of alpha_points are \[5, 5\]; they must rise"),
        (["0:0.1"], "the first from 1 on"),
    ],
)
def test_malformed_points_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        parse_points(points)
