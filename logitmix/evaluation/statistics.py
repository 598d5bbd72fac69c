"""Intervals and tests for rates on a few hundred problems. Pure functions.

Closed forms need only the standard library, so they are written out; tests compare them with SciPy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, exp, fsum, isclose, lgamma, log, log1p, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_RESAMPLED_AT_ONCE = 5_000_000  # numbers in memory, 40 MB


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a rate of `successes` in `n` independent trials, both ends in [0, 1].

    With z the two-sided normal quantile and p = successes / n, the ends are
    `(p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)` (Wilson 1927): all rates that a score test at this
    confidence does not reject. It holds its level for small n and for rates near 0 and 1, where p ± z·se does not.

    >>> wilson_interval(0, 200)
    (0.0, 0.018845...)

    Raises `ValueError` for n < 1: a rate needs at least one trial.
    """
    _validate_rate(successes, n)
    return score_interval(successes / n, n, confidence)


def score_interval(rate: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a rate in as many trials as `n` independent ones; n need not be whole."""
    z = _quantile(confidence)
    spread = z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # at 0 and 1 the end is exact; rounding must not push it beyond
    return (0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half)


def wilson_estimate(successes: int, n: int) -> Estimate:
    """The rate `successes / n` with its `wilson_interval`."""
    low, high = wilson_interval(successes, n)
    return Estimate(successes / n, low, high)


def mean_estimate(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of independent numbers with its normal interval, `mean ± z s / sqrt(n)`; of one number, that number.

    >>> mean_estimate([80, 90, 100]).low
    78.68...

    Raises `ValueError` for no numbers.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.size == 0:
        raise ValueError("there are no numbers to compute a mean of; evaluate at least one problem")
    mean = float(numbers.mean())
    error = float(numbers.std(ddof=1)) / sqrt(numbers.size) if numbers.size > 1 else 0.0
    half = _quantile(confidence) * error
    return Estimate(mean, mean - half, mean + half)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test that two policies are right equally often on the same problems.

    `only_a` and `only_b` count the problems that exactly one policy has right; the others carry no information about
    the difference. If the policies are equal, each such problem falls to either with probability 1/2, and
    `p = min(1, 2 P[Binomial(only_a + only_b, 1/2) <= min(only_a, only_b)])` (McNemar 1947; the sum is exact).

    >>> mcnemar_exact(5, 1)
    0.21875
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts are {only_a} and {only_b}, but cannot be negative")
    n = only_a + only_b
    # integers throughout: a float would overflow at n = 1,024
    tail = term = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def clopper_pearson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval for a rate of `successes` in `n` independent trials: all rates that neither one-sided
    binomial test rejects at half the level (Clopper & Pearson 1934). It covers at least at its confidence.

    >>> clopper_pearson_interval(0, 4)
    (0.0, 0.602...)

    Raises `ValueError` for n < 1.
    """
    _validate_rate(successes, n)
    level = (1 - confidence) / 2
    # the tails rise, and fall, with the rate
    low = 0.0 if successes == 0 else _bisect(lambda p: _binomial_tail(successes, n, p) - level)
    high = 1.0 if successes == n else _bisect(lambda p: 1 - level - _binomial_tail(successes + 1, n, p), rising=False)
    return low, high


def paired_rates(only_a: int, only_b: int, n: int) -> Estimate:
    """The difference of two rates on the same n problems, b - a, with an interval that McNemar's exact test decides.

    `only_a` and `only_b` count the problems that exactly one has right. The difference is `d (2 t - 1)`, with d the
    share of these problems and t the share of them that b has right. `clopper_pearson_interval` of t excludes 1/2
    exactly where `mcnemar_exact` is below 1 - 95 %; it is multiplied by the end of d's `wilson_interval` that makes
    the result wider. So the interval excludes 0 exactly where the test rejects, and it covers at least 95 %.

    >>> round(paired_rates(4, 0, 60).high, 3)
    0.033

    Raises `ValueError` for counts that are not those of n problems.
    """
    if min(only_a, only_b) < 0 or only_a + only_b > n or n < 1:
        raise ValueError(f"{only_a} and {only_b} problems cannot be disjoint parts of {n}")
    discordant = only_a + only_b
    few, many = wilson_interval(discordant, n)
    share = clopper_pearson_interval(only_b, discordant) if discordant else (0.0, 1.0)
    low, high = (2 * end - 1 for end in share)
    return Estimate((only_b - only_a) / n, low * (few if low > 0 else many), high * (many if high > 0 else few))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples of which some are.

    `1 - C(n - correct, k) / C(n, k)` (Chen et al., arXiv 2107.03374, eq. 1): the share of all k-subsets of the n
    samples that contain a right one. For k = 1 it is correct / n, the avg@n of one problem.

    >>> pass_at_k(n=4, correct=2, k=2)
    0.833...

    Raises `ValueError` for k outside 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but pass@k of {n} samples needs 1 <= k <= {n}; draw more samples, or lower k")
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} samples are right, but correct must be from 0 to {n}")
    return 1 - comb(n - correct, k) / comb(n, k)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of `a - b` with a percentile bootstrap interval; both are `[N]` or `[S, N]`.

    Row s holds the scores of seed s on the same N problems, so a and b are paired in both axes. Each resample draws N
    problems and S seeds with replacement, for a and b alike, and takes the mean of the differences: the interval
    covers other problems and other seeds of the same kind. With one row it covers problems only. With few seeds (3,
    say) it is too narrow, as there is little to draw from. If all differences are equal, its width is 0.

    Raises `ValueError` where the shapes differ, or there is nothing to draw from.
    """
    a_SN, b_SN = _scores(a, b)
    return bootstrap_rates((a_SN - b_SN)[None], lambda means_CR: means_CR[0], confidence, resamples, seed)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """As `paired_bootstrap` for scores in [0, 1], with a valid interval if all differences are equal; see
    `widen_if_constant`."""
    return widen_if_constant(paired_bootstrap(a, b), np.atleast_2d(np.asarray(a)).shape[1])


def widen_if_constant(estimate: Estimate, n: int) -> Estimate:
    """A bootstrap interval over n problems, widened if resampling showed no spread.

    If all problems agree, so do all resamples, however few problems there are. Other problems may still differ:
    Wilson's interval for 0 of n bounds their share, and widens the interval on both sides, within [-1, 1].

    >>> widen_if_constant(Estimate(0.0, 0.0, 0.0), 200).high
    0.018845...
    """
    if not isclose(estimate.low, estimate.high, abs_tol=1e-9):
        return estimate
    _, share = wilson_interval(0, n)
    return Estimate(estimate.value, max(-1.0, estimate.value - share), min(1.0, estimate.value + share))


def bootstrap_rates(
    scores: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """A statistic of C mean scores, with a percentile bootstrap interval; the scores are `[C, S, N]`.

    `statistic` takes the C means of each of R resamples, `[C, R]`, and returns R numbers, for instance the position of
    the largest mean. Resamples are drawn as in `paired_bootstrap`: the same seeds and problems for all C.

    Raises `ValueError` if there is nothing to draw from.
    """
    scores_CSN = np.asarray(scores, dtype=float)
    if scores_CSN.ndim != 3 or scores_CSN.size == 0:
        raise ValueError(f"the scores have shape {list(scores_CSN.shape)}, but need conditions, seeds and problems")
    _, S, N = scores_CSN.shape
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1")
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.float64]] = []
    while (left := resamples - sum(part.shape[1] for part in parts)) > 0:
        R = min(left, max(1, _RESAMPLED_AT_ONCE // N))
        # How often a resample holds each seed and each problem: the weights of a mean over the pairs
        seeds_RS = rng.multinomial(S, np.full(S, 1 / S), size=R) / S
        problems_RN = rng.multinomial(N, np.full(N, 1 / N), size=R) / N
        parts.append(np.array([((seeds_RS @ scores_SN) * problems_RN).sum(axis=1) for scores_SN in scores_CSN]))
    value = statistic(scores_CSN.mean(axis=(1, 2))[:, None])
    low, high = np.quantile(statistic(np.concatenate(parts, axis=1)), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value[0]), float(low), float(high))


def difference_from_noise(n: int, disagreement: float, confidence: float = CONFIDENCE) -> float:
    """The smallest difference of two rates on the same n problems that McNemar's exact test tells from 0.

    `disagreement` is the share of problems that exactly one of the two has right. Of `m = round(n · disagreement)`
    such problems it is the least uneven split that the test rejects; infinite if the test rejects none.

    >>> round(difference_from_noise(200, 0.3), 3)
    0.09
    """
    m = round(n * disagreement)
    for only_a in range((m + 1) // 2, m + 1):
        if mcnemar_exact(only_a, m - only_a) <= 1 - confidence:
            return (2 * only_a - m) / n
    return float("inf")


def _binomial_tail(k: int, n: int, p: float) -> float:
    """P[Binomial(n, p) >= k]."""
    if not 0 < p < 1:
        return float(k <= n * p)
    ways = (lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) for i in range(k, n + 1))
    return fsum(exp(way + i * log(p) + (n - i) * log1p(-p)) for i, way in enumerate(ways, k))


def _bisect(function: Callable[[float], float], rising: bool = True) -> float:
    """The root in (0, 1) of a monotone function, to float precision."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        is_left = (function(middle) < 0) == rising
        low, high = (middle, high) if is_left else (low, middle)
    return (low + high) / 2


def _validate_rate(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a rate; it needs n >= 1 and 0 <= successes <= n")


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1, as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _scores(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a_SN, b_SN = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (a, b))
    if a_SN.shape != b_SN.shape or a_SN.size == 0:
        raise ValueError(
            f"the scores have shapes {list(a_SN.shape)} and {list(b_SN.shape)}; a paired comparison needs the same "
            "problems and seeds in both, at least one of each"
        )
    return a_SN, b_SN
