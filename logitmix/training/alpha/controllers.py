"""Schedules of alpha over a run, as pure functions of the step or of validation counts.

Source: Gan & Zhu, arXiv 2605.20555, Algorithm 2 and eq. 7-9, and the authors' code (`validation_weighted`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Controller = Literal["fixed", "adaptive", "validation_weighted", "linear", "cosine", "piecewise", "kl_budget"]
CONTROLLERS: tuple[str, ...] = get_args(Controller)
VALIDATING = ("adaptive", "validation_weighted")
SCHEDULES = ("linear", "cosine", "piecewise")
KL_BUDGET = "kl_budget"

_TEMPERATURE = 0.25
_LOWEST, _HIGHEST = 0.05, 0.95


def validate_alpha(alpha: float | None) -> None:
    """Raise `ValueError` for an alpha at which the policy has no gradient."""
    if alpha is not None and not 0 <= alpha < 1:
        raise ValueError(
            f"alpha is {alpha}; training needs 0 <= alpha < 1, since the policy's gradient has the factor 1 - alpha"
        )


@dataclass(frozen=True)
class Counts:
    """Correct greedy responses to n validation questions (eq. 7-8).

    `policy`, `mixture` and `anchor` count the questions that each answers correctly (`anchor` is None if it was not
    decoded). `forgetting` is s1, the questions that the policy answers and the mixture does not; `gain` is s2, the
    reverse.
    """

    n: int
    policy: int
    mixture: int
    forgetting: int
    gain: int
    anchor: int | None = None


def standardised_gain(counts: Counts, offset: float, scale: float) -> float:
    """s3 of eq. 9: `(s2 - s1 - c_o) / c_d`. Offset and scale count questions, so they depend on `n`."""
    return (counts.gain - counts.forgetting - offset) / scale


def adaptive(counts: Counts, offset: float, scale: float) -> float:
    """The next alpha of Algorithm 2, `sigmoid(s3)` (eq. 9). The paper uses offset 25, scale 35 and 100 questions.

    Without gain or forgetting this is sigmoid(-25/35) = 0.329; it lies within [0.027, 0.895] at the paper's values.
    """
    return sigmoid(standardised_gain(counts, offset, scale))


def validation_weighted(alpha: float, counts: Counts) -> float:
    """The next alpha of the authors' later variant, from the accuracies of policy, mixture and anchor:

        w = softmax([acc_policy, acc_mixture, acc_anchor] / 0.25)
        alpha <- clip(0.5 alpha + 0.5 (w_mixture alpha + w_anchor), 0.05, 0.95)

    Under constant accuracies alpha settles at `w_anchor / (w_policy + w_anchor)`.
    """
    assert counts.anchor is not None
    odds = [math.exp(correct / counts.n / _TEMPERATURE) for correct in (counts.policy, counts.mixture, counts.anchor)]
    target = (odds[1] * alpha + odds[2]) / sum(odds)
    return min(max(0.5 * alpha + 0.5 * target, _LOWEST), _HIGHEST)


def linear(progress: float, start: float, end: float) -> float:
    """alpha on a line from `start` to `end`; `progress` is the completed share of the run, from 0 to 1."""
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """alpha on half a cosine wave from `start` to `end`: slow at both ends, fastest halfway."""
    return linear((1 - math.cos(math.pi * progress)) / 2, start, end)


def piecewise(step: int, points: Sequence[tuple[int, float]]) -> float:
    """alpha, linear between `points` of (step, alpha), and constant before the first and after the last point."""
    for (left, start), (right, end) in pairwise(points):
        if left <= step < right:
            return linear((step - left) / (right - left), start, end)
    return points[0][1] if step < points[0][0] else points[-1][1]


def parse_points(points: Sequence[str]) -> list[tuple[int, float]]:
    """`["100:0.2", "200:0.1"]` as (step, alpha).

    Raises `ValueError` for an empty list, for a point that is not STEP:ALPHA with 0 <= ALPHA < 1, and for steps that
    do not increase.
    """
    if not points:
        raise ValueError("alpha_points is empty; give points STEP:ALPHA, 100:0.2 for instance")
    parsed = []
    for point in points:
        step, _, alpha = str(point).partition(":")
        try:
            parsed.append((int(step), float(alpha)))
        except ValueError:
            raise ValueError(
                f"{point!r} in alpha_points is not STEP:ALPHA; write 100:0.2 for alpha 0.2 at step 100"
            ) from None
        if not 0 <= parsed[-1][1] < 1:
            raise ValueError(f"{point!r} in alpha_points has alpha {alpha}; training needs 0 <= alpha < 1")
    steps = [step for step, _ in parsed]
    if steps[0] < 1 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"the steps of alpha_points are {steps}; they must rise, the first from 1 on")
    return parsed


def sigmoid(x: float) -> float:
    """`1 / (1 + exp(-x))`, without overflow at any finite x."""
    return 0.5 * (1 + math.tanh(0.5 * x))
