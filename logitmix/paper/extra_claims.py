"""Claims beyond the paper: one model in the end, measured beside the mixture of fixed mixing. Pure functions."""

from collections.abc import Callable, Mapping

from logitmix.evaluation.statistics import paired_difference
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import EXTRA_TITLES
from logitmix.paper.verdicts import BEYOND, Finding, not_below


def one_model_keeps_what_the_mixture_reached(o: Outcomes) -> Finding:
    return _one_model(o, "distilled", "One model keeps what the mixture reached")


def annealing_ends_where_fixed_mixing_does(o: Outcomes) -> Finding:
    return _one_model(o, "anneal", "Lowering alpha to 0 in training leaves a policy that needs no anchor")


def a_policy_target_ends_where_fixed_mixing_does(o: Outcomes) -> Finding:
    return _one_model(
        o, "policy_target", "Training the policy alone on the mixture's rollouts does without the mixture"
    )


EXTRA_CLAIMS: Mapping[str, Callable[[Outcomes], Finding]] = {
    "distilled": one_model_keeps_what_the_mixture_reached,
    "anneal": annealing_ends_where_fixed_mixing_does,
    "policy_target": a_policy_target_ends_where_fixed_mixing_does,
}


def evaluate_extra_claims(o: Outcomes) -> list[Finding]:
    """The findings about those of the extra arms that the reproduction has."""
    return [claim(o) for arm, claim in EXTRA_CLAIMS.items() if o.steps(arm)]


def _one_model(o: Outcomes, arm: str, claim: str) -> Finding:
    one, mixture = o.single_model_scores(arm), o.arm_scores("fixed_mixing", o.steps("fixed_mixing")[-1])
    estimate = paired_difference(one, mixture)
    title = EXTRA_TITLES[arm]
    return Finding(
        claim,
        BEYOND,
        "not measured",
        f"answer-correct, {title}, one model - fixed mixing, after training; no less than -2 points",
        estimate,
        not_below(estimate),
        rates={f"{title}, one model": float(one.mean()), "fixed mixing": float(mixture.mean())},
    )
