"""The paper's claims as functions, on synthetic rows with a known verdict: holds, does not hold, undecided."""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from logitmix.evaluation.outcomes import KEYS, pack, pack_outcomes, unpack
from logitmix.evaluation.statistics import (
    Estimate,
    bootstrap_rates,
    paired_bootstrap,
    paired_difference,
    wilson_interval,
)
from logitmix.paper import claims, sweep_claims
from logitmix.paper.claims import CLAIMS, evaluate_claims, validate_num_problems
from logitmix.paper.extra_claims import EXTRA_CLAIMS, evaluate_extra_claims
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.report import count_verdicts
from logitmix.paper.tables import one_model_tables
from logitmix.paper.verdicts import above, comparable, not_below
from tests.helpers.responses import make_response

ALPHAS = [i / 10 for i in range(11)]
N, SEEDS = 400, (0, 1, 2)
MIXTURES = ("fixed_mixing", "adaptive_mixing", "prob_mixing", "base_anchor")
# The paper's table 4: format and answer rates by alpha
LOGIT = (
    (0, 0.4, 5.8, 32, 80.2, 89.2, 81.6, 87.8, 88.2, 92.2, 90.8),
    (0, 0.2, 3.8, 17.6, 50.4, 55.6, 47.6, 45.4, 45.4, 43.4, 39.8),
)
PROB = ((0, 0, 0.4, 1, 5.2, 75, 88.4, 91, 90.2, 90.2, 90.8), (0, 0, 0.4, 0.6, 3, 47.2, 50.6, 46.2, 44, 40.4, 39.8))
NOTHING = ((0,) * 11, (0,) * 11)
RARELY, NEVER = (1.0, 0.04, 0.1), (1.0, 0.0, 0.0)
EQUAL = ({"prob_mixing": 0.6}, {"prob_mixing": 0.8})


@cache
def right(rate: float, first: int = 0) -> np.ndarray:
    """A share of the problems, chosen in a random order, starting at its `first`."""
    order = np.random.default_rng(7).permutation(N)
    chosen = np.zeros(N, dtype=bool)
    chosen[np.roll(order, -first)[: round(rate * N)]] = True
    return chosen


def row(what: str, seed: int, outcomes: dict, **which) -> dict:
    return {"what": what, "seed": seed, "n": N} | which | {key: pack(outcomes[key]) for key in KEYS}


def rows(
    sft=(0.95, 0.59, 0.62), policy=(0.90, 0.76, 0.80), first=None, last=None, logit=LOGIT, prob=PROB
) -> list[dict]:
    """A reproduction that agrees with the paper: format, answer and lenient rates of members, answer rates of arms."""
    first = (
        dict.fromkeys(MIXTURES, 0.6)
        | {"grpo": 0.59, "grpo_kl": 0.59, "base_anchor": 0.05, "prob_mixing": 0.49}
        | (first or {})
    )
    last = (
        dict.fromkeys(MIXTURES, 0.8)
        | {"grpo": 0.7, "grpo_kl": 0.75, "base_anchor": 0.7, "prob_mixing": 0.76}
        | (last or {})
    )
    made = [{"what": "run"}, {"what": "training", "seed": 0}]
    for seed in SEEDS:
        for arm in first:
            name = "mixture" if arm in MIXTURES else "model"
            for step, rate in ((0, first[arm]), (20, (first[arm] + last[arm]) / 2), (40, last[arm])):
                same = dict.fromkeys(KEYS, right(rate))
                made.append(row("evaluation", seed, same, arm=arm, step=step, name=name))
        for name, rates, step, begin in (("anchor", sft, 0, 0), ("policy", policy, 40, 60)):
            outcomes = {key: right(rate, begin) for key, rate in zip(KEYS, rates, strict=True)}
            made.append(row("evaluation", seed, outcomes, arm="fixed_mixing", step=step, name=name))
        for scheme, curves in (("logit", logit), ("prob", prob), ("merge", logit)):
            for alpha, *rates in zip(ALPHAS, *curves, strict=True):
                outcomes = {
                    "format_ok": right(rates[0] / 100),
                    "answer_ok": right(rates[1] / 100),
                    "lenient_ok": right(1),
                }
                made.append(row("sweep", seed, outcomes, scheme=scheme, alpha=alpha))
    return made


def verdict(claim, **changed) -> str:
    return claim(Outcomes(rows(**changed))).verdict


# --- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "low", "high", "expected"),
    [
        (above, 0.01, 0.05, "holds"),
        (above, -0.01, 0.05, "undecided"),
        (above, 0.0, 0.05, "undecided"),
        (above, -0.05, -0.01, "does not hold"),
        (above, 0.0, 0.0, "does not hold"),
        (not_below, -0.02, 0.5, "holds"),
        (not_below, -0.03, 0.5, "undecided"),
        (not_below, -0.09, -0.021, "does not hold"),
        (comparable, -0.02, 0.02, "holds"),
        (comparable, -0.05, 0.01, "undecided"),
        (comparable, -0.05, 0.05, "undecided"),
        (comparable, 0.03, 0.05, "does not hold"),
        (comparable, -0.05, -0.03, "does not hold"),
    ],
)
def test_a_verdict_depends_on_the_whole_interval(rule, low, high, expected):
    assert rule(Estimate((low + high) / 2, low, high)) == expected


# --- claims --------------------------------------------------------------------------------------------------------


def test_every_claim_holds_on_rows_like_the_papers():
    found = evaluate_claims(Outcomes(rows()))
    assert {f.claim: f.verdict for f in found if f.verdict != "holds"} == {}
    assert len(found) == len(CLAIMS) == len({f.claim for f in found})
    peaks = next(f for f in found if f.claim.startswith("The untrained pair peaks"))
    assert peaks.estimate.value == pytest.approx(0.05, abs=0.02)
    assert list(peaks.rates) == ["logit at alpha 0.5", "probability at alpha 0.6"]


@pytest.mark.parametrize(
    ("claim", "failing", "open_"),
    [
        (claims.anchor_formats_better, {"policy": (0.99, 0.76, 0.8)}, {"policy": (0.95, 0.76, 0.8)}),
        (claims.policy_reasons_better, {"policy": (0.9, 0.3, 0.8)}, {"policy": (0.9, 0.59, 0.8)}),
        (claims.policy_reasons_better_in_any_format, {"policy": (0.9, 0.76, 0.4)}, {"policy": (0.9, 0.76, 0.62)}),
        (claims.one_alone_is_right_often, {"sft": RARELY, "policy": RARELY}, {"sft": NEVER, "policy": (1, 0.22, 1)}),
        (claims.mixing_is_no_worse_than_grpo_with_kl, {"last": {"grpo_kl": 0.87}}, {"last": {"grpo_kl": 0.82}}),
        (claims.mixing_beats_grpo, {"last": {"grpo": 0.87}}, {"last": {"grpo": 0.8}}),
        (claims.adaptive_is_comparable, {"last": {"adaptive_mixing": 0.9}}, {"last": {"adaptive_mixing": 0.82}}),
        (claims.base_anchor_starts_lower, {"first": {"base_anchor": 0.7}}, {"first": {"base_anchor": 0.6}}),
        (claims.base_anchor_does_not_catch_up, {"last": {"base_anchor": 0.9}}, {"last": {"base_anchor": 0.8}}),
        (claims.logits_lead_from_the_first_step, {"first": {"prob_mixing": 0.7}}, {"first": {"prob_mixing": 0.6}}),
        (claims.logits_stay_ahead, {"last": {"prob_mixing": 1.0}}, {"first": EQUAL[0], "last": EQUAL[1]}),
        (sweep_claims.logits_need_a_smaller_weight, {"logit": PROB, "prob": LOGIT}, None),
        (sweep_claims.logits_peak_higher, {"logit": PROB, "prob": LOGIT}, {"prob": LOGIT}),
        (sweep_claims.both_peaks_exceed_the_anchor, None, {"prob": (PROB[0], (0,) * 10 + (39.8,))}),
        (sweep_claims.logits_peak_at_a_smaller_alpha, {"logit": PROB, "prob": LOGIT}, {"prob": NOTHING}),
        (sweep_claims.probabilities_peak_where_the_anchor_dominates, {"prob": LOGIT}, {"prob": NOTHING}),
    ],
)  # fmt: skip
def test_claims_that_fail_and_claims_that_stay_undecided(claim, failing, open_):
    assert verdict(claim) == "holds"
    if failing is not None:
        assert verdict(claim, **failing) == "does not hold"
    if open_ is not None:
        assert verdict(claim, **open_) == "undecided"


def beyond(arm: str, rate: float) -> Outcomes:
    """A reproduction in which fixed mixing reaches 0.8, and the one model of an arm beyond the paper this rate."""
    made = rows()
    for seed in SEEDS:
        same = dict.fromkeys(KEYS, right(rate))
        if arm == "distilled":
            made.append(row("evaluation", seed, same, arm=arm, step=150, name="model"))
        else:  # its mixture is not what is left
            for name, outcomes in (("policy", same), ("mixture", dict.fromkeys(KEYS, right(0.99)))):
                made.append(row("evaluation", seed, outcomes, arm=arm, step=40, name=name))
    return Outcomes(made)


@pytest.mark.parametrize("arm", EXTRA_CLAIMS)
def test_one_model_is_compared_with_the_mixture_of_fixed_mixing(arm):
    for rate, expected in ((0.8, "holds"), (0.78, "undecided"), (0.7, "does not hold")):
        (found,) = evaluate_extra_claims(beyond(arm, rate))
        assert found.verdict == expected
        assert found.estimate.value == pytest.approx(rate - 0.8)
        assert count_verdicts([found]).startswith("0 of 0 claims hold"), "the paper's alone are counted"
    (table,) = one_model_tables(beyond(arm, 0.7))
    assert [row[3].split()[0] for row in table.rows] == ["-10.0"]


def test_without_an_arm_beyond_the_paper_nothing_is_said_of_it():
    assert one_model_tables(Outcomes(rows())) == []
    assert evaluate_extra_claims(Outcomes(rows())) == []


def test_the_best_alpha_is_scored_on_problems_that_did_not_choose_it():
    """The largest of eleven noisy rates is biased upwards; scored on other problems it is not."""
    chance = np.random.default_rng(0)
    excess, naive = [], []
    for _ in range(100):
        made = [
            row("sweep", 0, dict.fromkeys(KEYS, chance.random(N) < 0.5), scheme="logit", alpha=alpha)
            for alpha in ALPHAS
        ]
        o = Outcomes(made)
        excess.append(sweep_claims.scores_at_best_alpha(o, "logit")[0].mean() - 0.5)
        naive.append(max(o.sweep_scores("logit", alpha).mean() for alpha in ALPHAS) - 0.5)
    standard_error = 0.5 / math.sqrt(N * 100)
    assert np.mean(naive) > 10 * standard_error
    assert abs(np.mean(excess)) < 3 * standard_error


def test_the_half_maximum_is_interpolated_between_grid_points():
    alphas = np.array([0.0, 0.5, 1.0])
    rates_CR = np.array([[0.0, 0.8, 0.0], [0.2, 0.9, 0.0], [0.8, 1.0, 1.0]])
    np.testing.assert_allclose(sweep_claims._half_maximum(alphas, rates_CR), [0.5 + 0.5 / 3, 0.0, 0.75])


@pytest.mark.parametrize("n", [-1, 0, 1, 5])
def test_too_few_problems_for_any_verdict_are_rejected(n):
    with pytest.raises(ValueError, match=rf"eval_limit is {n}, .* raise it above 5"):
        validate_num_problems(n)
    validate_num_problems(6)


def test_a_reproduction_that_lacks_a_seed_of_an_arm_is_rejected():
    made = [r for r in rows() if not (r.get("arm") == "grpo" and r["seed"] == 1)]
    with pytest.raises(ValueError, match=r"no results of grpo 40 model for seeds \[1\]; let the reproduction finish"):
        evaluate_claims(Outcomes(made))


def test_evaluations_of_different_sizes_are_rejected():
    made = rows()
    made[-1]["n"] = 12
    with pytest.raises(ValueError, match=r"evaluations of \[12, 400\] problems cannot be compared"):
        evaluate_claims(Outcomes(made))


# --- outcomes and statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 500])
def test_packed_outcomes_unpack_unchanged(n):
    original = np.random.default_rng(n).random(n) < 0.5
    assert np.array_equal(unpack(pack(original), n), original)
    assert len(pack(original)) == 2 * math.ceil(n / 8)
    with pytest.raises(ValueError, match="not those of"):
        unpack(pack(original), n + 8)


def test_outcomes_are_packed_in_the_order_of_the_problems():
    made = [make_response(problem=i, answer_ok=i == 2, lenient_ok=False) for i in (3, 2, 0, 1)]
    assert pack_outcomes(made) == {"format_ok": "f0", "answer_ok": "20", "lenient_ok": "00"}


def test_a_bootstrap_of_a_difference_is_the_paired_bootstrap():
    a, b = np.random.default_rng(0).random((2, 3, 50)) < 0.5
    expected = paired_bootstrap(a, b)
    found = bootstrap_rates([a, b], lambda rates_CR: rates_CR[0] - rates_CR[1])
    assert [found.value, found.low, found.high] == pytest.approx([expected.value, expected.low, expected.high])


def test_a_bootstrap_of_a_mean_has_the_width_of_a_normal_interval():
    scores = np.random.default_rng(1).random((1, 1, 2000)) < 0.3
    found = bootstrap_rates(scores, lambda rates_CR: rates_CR[0])
    error = stats.sem(scores.ravel().astype(float)) * 1.96
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.002)


def test_equal_outcomes_of_few_problems_leave_uncertainty():
    same = paired_difference([1.0] * 20, [1.0] * 20)
    _, share = wilson_interval(0, 20)
    assert (same.value, same.low, same.high) == (0, -share, share)
    apart = paired_difference([1.0] * 20, [0.0] * 20)
    assert (apart.value, apart.low, apart.high) == (1, 1 - share, 1)
    a, b = [1.0, 0.0] * 10, [0.0, 0.0] * 10
    assert paired_difference(a, b) == paired_bootstrap(a, b)
