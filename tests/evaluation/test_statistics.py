"""Statistics, compared with closed forms, exhaustive enumeration and SciPy."""

import doctest
import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from logitmix.evaluation import statistics
from logitmix.evaluation.statistics import (
    Estimate,
    clopper_pearson_interval,
    difference_from_noise,
    mcnemar_exact,
    paired_bootstrap,
    paired_rates,
    pass_at_k,
    wilson_interval,
)

settings.register_profile("any load", deadline=None)
settings.load_profile("any load")
counts = st.integers(0, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(statistics, optionflags=doctest.ELLIPSIS)
    assert tried >= 4
    assert failed == 0


@given(counts.filter(lambda c: c[1] > 0), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_interval_matches_scipy(count, confidence):
    expected = scipy.stats.binomtest(*count).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*count, confidence) == pytest.approx(tuple(expected), abs=1e-12)


@given(counts.filter(lambda c: c[1] > 0))
def test_the_score_test_reaches_its_critical_value_at_the_ends_of_wilsons_interval(count):
    successes, n = count
    for end in wilson_interval(successes, n):
        if 0 < end < 1:
            assert abs(successes / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, abs=1e-4)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_matches_scipys_binomial_test(only_a, only_b):
    n = only_a + only_b
    expected = scipy.stats.binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_matches_enumeration_for_few_problems():
    """The p-value is the share of all outcomes of n fair coins that are at least as uneven as the observed one."""
    for n in range(1, 9):
        for only_a in range(n + 1):
            uneven = abs(2 * only_a - n)
            as_uneven = [abs(2 * sum(coins) - n) >= uneven for coins in itertools.product((0, 1), repeat=n)]
            assert mcnemar_exact(only_a, n - only_a) == pytest.approx(np.mean(as_uneven))


def test_mcnemar_of_large_counts_does_not_overflow():
    assert mcnemar_exact(3000, 3000) == 1.0
    assert 0 < mcnemar_exact(1000, 800) < 1e-5


@given(counts.filter(lambda c: c[1] > 0), st.sampled_from([0.8, 0.95, 0.99]))
def test_clopper_pearsons_interval_matches_scipy(count, confidence):
    expected = scipy.stats.binomtest(*count).proportion_ci(confidence, method="exact")
    assert clopper_pearson_interval(*count, confidence) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize("n", [1, 7, 30, 60])
def test_the_interval_of_a_difference_excludes_0_exactly_where_mcnemars_test_rejects(n):
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            found = paired_rates(only_a, only_b, n)
            excludes_0 = found.low > 0 or found.high < 0
            assert excludes_0 == (mcnemar_exact(only_a, only_b) < 0.05)
            assert -1 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("discordant", "share"), [(0.05, 0.5), (0.2, 0.9), (0.3, 0.5), (0.5, 0.5), (0.5, 1.0)])
def test_the_interval_of_a_difference_covers_its_level(discordant, share):
    """By enumeration: the probability of the tables whose interval contains the true difference."""
    n, true, covered = 40, discordant * (2 * share - 1), 0.0
    for m in range(n + 1):
        for only_b in range(m + 1):
            found = paired_rates(m - only_b, only_b, n)
            if found.low - 1e-12 <= true <= found.high + 1e-12:
                covered += scipy.stats.binom.pmf(m, n, discordant) * scipy.stats.binom.pmf(only_b, m, share)
    assert covered >= 0.95


def test_problems_on_which_both_always_agree_leave_a_difference_open():
    assert paired_rates(0, 0, 200) == Estimate(0.0, -wilson_interval(0, 200)[1], wilson_interval(0, 200)[1])


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_matches_enumeration_of_subsets(case):
    n, correct, k = case
    subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_is_unbiased():
    """Its expectation over n samples is 1 - (1 - p)^k."""
    n, k, p = 10, 4, 0.3
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_the_bootstrap_over_problems_matches_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.random(150) < 0.8, rng.random(150) < 0.6
    ours = paired_bootstrap(a, b)
    theirs = scipy.stats.bootstrap(
        (a.astype(float) - b,), np.mean, n_resamples=10_000, method="percentile", random_state=0
    ).confidence_interval
    assert ours.value == pytest.approx(a.mean() - b.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_bootstrap_resamples_seeds_and_problems():
    """The two axes are independent: differences that vary only by seed keep the variance over seeds."""
    effects = np.arange(8.0)
    by_seed = paired_bootstrap(np.repeat(effects[:, None], 50, axis=1), np.zeros((8, 50)))
    over_eight = paired_bootstrap(effects, np.zeros(8), seed=1)
    assert (by_seed.low, by_seed.high) == pytest.approx((over_eight.low, over_eight.high), abs=0.15)
    problems = np.arange(50.0)
    by_problem = paired_bootstrap(np.repeat(problems[None], 8, axis=0), np.zeros((8, 50)))
    assert by_problem.high - by_problem.low == pytest.approx(2 * 1.96 * problems.std() / math.sqrt(50), rel=0.05)


def test_the_bootstrap_over_thousands_of_problems_matches_the_normal_interval():
    """So many problems are resampled in several parts."""
    n = 30_000
    a = np.arange(n) % 10 < 7
    found = paired_bootstrap(a, np.zeros(n), resamples=2_000)
    assert (found.low, found.high) == pytest.approx(scipy.stats.norm.interval(0.95, 0.7, np.sqrt(0.21 / n)), abs=5e-4)


def test_the_bootstrap_is_deterministic_and_antisymmetric():
    a, b = np.random.default_rng(0).random((2, 3, 40))
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert there == paired_bootstrap(a, b)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


@pytest.mark.parametrize("n", [50, 200, 500])
def test_the_smallest_difference_beyond_noise_is_the_first_that_mcnemar_rejects(n):
    for share in (0.2, 0.3, 0.5):
        gap = round(difference_from_noise(n, share) * n)
        m = round(n * share)
        assert mcnemar_exact((m + gap) // 2, (m - gap) // 2) <= 0.05
        assert mcnemar_exact((m + gap) // 2 - 1, (m - gap) // 2 + 1) > 0.05


def test_with_too_few_disagreements_no_difference_is_beyond_noise():
    assert difference_from_noise(5, 1.0) == math.inf
    assert difference_from_noise(200, 0.0) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), "0 of 0 is not a rate"),
        (lambda: wilson_interval(3, 2), "3 of 2 is not a rate"),
        (lambda: wilson_interval(1, 2, 95), "confidence is 95"),
        (lambda: paired_rates(3, 3, 5), "cannot be disjoint parts of 5"),
        (lambda: mcnemar_exact(-1, 2), "cannot be negative"),
        (lambda: pass_at_k(4, 1, 5), "draw more samples, or lower k"),
        (lambda: pass_at_k(4, 5, 1), "5 of 4 samples"),
        (lambda: paired_bootstrap([1, 0], [1]), r"shapes \[1, 2\] and \[1, 1\]"),
        (lambda: paired_bootstrap([], []), "at least one of each"),
        (lambda: paired_bootstrap([1], [1], resamples=0), "resamples is 0"),
    ],
)
def test_invalid_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
