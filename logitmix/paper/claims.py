"""The claims of arXiv 2605.20555, one function each: from the outcomes of a reproduction to a verdict.

Each claim is about a number, such as a difference of two rates. Its 95 % interval, a bootstrap over problems and
seeds, decides the verdict (`paper.verdicts`). Pure functions.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from logitmix.evaluation.statistics import CONFIDENCE, Estimate, mcnemar_exact, paired_difference
from logitmix.paper.extra_claims import evaluate_extra_claims
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import TITLES
from logitmix.paper.sweep_claims import (
    both_peaks_exceed_the_anchor,
    logits_need_a_smaller_weight,
    logits_peak_at_a_smaller_alpha,
    logits_peak_higher,
    probabilities_peak_where_the_anchor_dominates,
)
from logitmix.paper.verdicts import Finding, Verdict, above, comparable, not_below

Scores = NDArray[np.float64]

# The smallest share of problems that exactly one policy has right, in the paper's table 3
MIN_DISAGREEMENT = 0.22


def evaluate_claims(outcomes: Outcomes) -> list[Finding]:
    """All findings, in the paper's order, then those beyond the paper whose arms were run.

    Raises `ValueError` for too few problems (`validate_num_problems`)."""
    validate_num_problems(outcomes.n)
    return [*(claim(outcomes) for claim in CLAIMS), *evaluate_extra_claims(outcomes)]


def validate_num_problems(n: int) -> None:
    """Raise `ValueError` for so few problems that no difference could be significant."""
    if n < 1 or mcnemar_exact(n, 0) > 1 - CONFIDENCE:
        raise ValueError(
            f"eval_limit is {n}, but with so few problems no difference is significant, not even {n} to 0 by "
            "McNemar's exact test; raise it above 5, the paper has 200 and 500"
        )


# --- section 3: two policies that complement each other -------------------------------------------------------------


def anchor_formats_better(o: Outcomes) -> Finding:
    sft, policy = o.anchor_scores("format_ok"), _policy(o, "format_ok")
    estimate = paired_difference(sft, policy)
    return Finding(
        "The anchor formats better than the trained policy",
        "section 3, pattern 1; tables 1 and 2",
        "8 of 9 cells, -8.5 to +53.0 points",
        "format-correct, anchor - policy of fixed mixing, after training; above 0",
        estimate,
        above(estimate),
        rates=_means(anchor=sft, policy=policy),
    )


def policy_reasons_better(o: Outcomes) -> Finding:
    policy, sft = _policy(o), o.anchor_scores()
    estimate = paired_difference(policy, sft)
    return Finding(
        "The trained policy reasons better than the anchor",
        "section 3, pattern 1; tables 1 and 2",
        "8 of 9 cells, -6.5 to +20.0 points",
        "answer-correct (in the format and right), policy of fixed mixing - anchor, after training; above 0",
        estimate,
        above(estimate),
        rates=_means(policy=policy, anchor=sft),
    )


def policy_reasons_better_in_any_format(o: Outcomes) -> Finding:
    policy, sft = _policy(o, "lenient_ok"), o.anchor_scores("lenient_ok")
    estimate = paired_difference(policy, sft)
    return Finding(
        "The answer-correct gap is a lower bound of the policy's true advantage in reasoning",
        "section 3, pattern 1",
        "not measured",
        "correct in any format, policy of fixed mixing - anchor, after training; above 0",
        estimate,
        above(estimate),
        rates=_means(policy=policy, anchor=sft),
    )


def one_alone_is_right_often(o: Outcomes) -> Finding:
    policy, sft = _policy(o), o.anchor_scores()
    estimate = paired_difference(abs(policy - sft), np.zeros_like(sft))
    return Finding(
        "Exactly one of the two is right on a non-trivial share of problems",
        "section 3, pattern 2; table 3",
        "22 to 38 %",
        "share of problems that one alone has answer-correct; above 22 %",
        estimate,
        above(estimate, MIN_DISAGREEMENT),
        "share",
        rates={"policy only": float((policy > sft).mean()), "anchor only": float((sft > policy).mean())},
    )


# --- section 4: training -------------------------------------------------------------------------------------------


def mixing_is_no_worse_than_grpo_with_kl(o: Outcomes) -> Finding:
    return _after_training(
        o,
        ("fixed_mixing", "grpo_kl"),
        "Fixed mixing is more accurate than GRPO+KL, or at least comparable",
        "section 4.1; figures 2, 4, 5",
        "all nine cells",
        "no less than -2 points",
        not_below,
    )


def mixing_beats_grpo(o: Outcomes) -> Finding:
    return _after_training(
        o,
        ("fixed_mixing", "grpo"),
        "Fixed mixing outperforms GRPO without KL from the SFT model",
        "section 4.1; figure 3",
        "MATH 3B, a figure",
        "above 0",
        above,
    )


def adaptive_is_comparable(o: Outcomes) -> Finding:
    return _after_training(
        o,
        ("adaptive_mixing", "fixed_mixing"),
        "Adaptive and fixed mixing end up about equal",
        "section 4.2; figures 6, 7",
        "about equal on MATH; 1 to 2 points above on MMLU 3B",
        "within ±2 points",
        comparable,
    )


def base_anchor_starts_lower(o: Outcomes) -> Finding:
    return _at_the_first_step(
        o,
        ("fixed_mixing", "base_anchor"),
        "With the base as the anchor training starts much lower than with the SFT model",
        "section 4.3; figure 8",
        "cn_k12, three figures",
    )


def base_anchor_does_not_catch_up(o: Outcomes) -> Finding:
    return _after_training(
        o,
        ("fixed_mixing", "base_anchor"),
        "The base anchor never quite catches up with the SFT anchor",
        "section 4.3; figure 8",
        "cn_k12, three figures",
        "above 0",
        above,
    )


# --- section 5: logits or probabilities ----------------------------------------------------------------------------


def logits_lead_from_the_first_step(o: Outcomes) -> Finding:
    return _at_the_first_step(
        o,
        ("fixed_mixing", "prob_mixing"),
        "In training logit mixing leads probability mixing from the first step",
        "section 5; figure 9",
        "about 11 points",
    )


def logits_stay_ahead(o: Outcomes) -> Finding:
    steps = [step for step in o.steps("fixed_mixing") if step > 0]
    logit, prob = ([o.arm_scores(arm, step) for step in steps] for arm in ("fixed_mixing", "prob_mixing"))
    estimate = paired_difference(np.mean(logit, axis=0), np.mean(prob, axis=0))
    ahead = np.mean([a.mean() > b.mean() for a, b in zip(logit, prob, strict=True)])
    return Finding(
        "Logit mixing stays ahead of probability mixing for the rest of training",
        "section 5; figure 9",
        "2 to 5 points",
        "answer-correct, fixed mixing - probability mixing, mean over all evaluations after the first; above 0",
        estimate,
        above(estimate),
        rates=_means(logit=np.array(logit), probability=np.array(prob)) | {"evaluations ahead": float(ahead)},
    )


CLAIMS: tuple[Callable[[Outcomes], Finding], ...] = (
    anchor_formats_better,
    policy_reasons_better,
    policy_reasons_better_in_any_format,
    one_alone_is_right_often,
    mixing_is_no_worse_than_grpo_with_kl,
    mixing_beats_grpo,
    adaptive_is_comparable,
    base_anchor_starts_lower,
    base_anchor_does_not_catch_up,
    logits_need_a_smaller_weight,
    logits_peak_higher,
    both_peaks_exceed_the_anchor,
    logits_peak_at_a_smaller_alpha,
    probabilities_peak_where_the_anchor_dominates,
    logits_lead_from_the_first_step,
    logits_stay_ahead,
)


def _name(arm: str) -> str:
    return "GRPO" if arm == "grpo" else TITLES[arm]  # the text of a claim mentions the KL


def _policy(o: Outcomes, key: str = "answer_ok") -> Scores:
    return o.member_scores("fixed_mixing", "policy", o.steps("fixed_mixing")[-1], key)


def _means(**scores: Scores) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}


def _after_training(
    o: Outcomes,
    arms: tuple[str, str],
    claim: str,
    source: str,
    paper: str,
    must_be: str,
    rule: Callable[[Estimate], Verdict],
) -> Finding:
    a, b = (o.arm_scores(arm, o.steps(arm)[-1]) for arm in arms)
    estimate = paired_difference(a, b)
    first, second = map(_name, arms)
    measure = f"answer-correct, {first} - {second}, after training; {must_be}"
    return Finding(claim, source, paper, measure, estimate, rule(estimate), rates=_means(**{first: a, second: b}))


def _at_the_first_step(o: Outcomes, arms: tuple[str, str], claim: str, source: str, paper: str) -> Finding:
    a, b = (o.arm_scores(arm, o.steps(arm)[0]) for arm in arms)
    estimate = paired_difference(a, b)
    first, second = map(_name, arms)
    measure = f"answer-correct, {first} - {second}, before the first step; above 0"
    return Finding(claim, source, paper, measure, estimate, above(estimate), rates=_means(**{first: a, second: b}))
