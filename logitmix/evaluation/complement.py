"""How two policies complement each other on the same problems: tables 1 to 3 of arXiv 2605.20555. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from logitmix.evaluation.metrics import FIELDS
from logitmix.evaluation.requests import Response
from logitmix.evaluation.statistics import (
    CONFIDENCE,
    Estimate,
    difference_from_noise,
    mcnemar_exact,
    mean_estimate,
    paired_rates,
    wilson_estimate,
)


@dataclass(frozen=True)
class Difference:
    """The rates of policies a and b on the same problems, and b - a with McNemar's exact p-value.

    The interval of b - a excludes 0 exactly where the p-value is below 5 %.
    """

    a: Estimate
    b: Estimate
    b_minus_a: Estimate
    p_value: float


@dataclass(frozen=True)
class MeanDifference:
    """Means of policies a and b over the same problems, and that of b - a."""

    a: Estimate
    b: Estimate
    b_minus_a: Estimate


@dataclass(frozen=True)
class Cross:
    """Problems by which of two policies has them right.

    `disagreement` is the share where exactly one has, `either` where at least one has: what a perfect choice between
    the two would reach.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    disagreement: Estimate
    either: Estimate


@dataclass(frozen=True)
class Complement(Cross):
    """Tables 1 to 3 for policies a and b on n problems.

    `answer` is right in the format, `lenient` right anywhere in the text, `truncated` cut by the length limit. The
    counts of `Cross` are those of right answers in the format, and `lenient_cross` counts right answers anywhere in
    the text. `noise` is the smallest difference of the answer rates that McNemar's exact test tells from 0 with this
    number of problems and this disagreement.
    """

    n: int
    format: Difference
    answer: Difference
    lenient: Difference
    truncated: Difference
    mean_length: MeanDifference
    lenient_cross: Cross
    noise: float


def complement(a: Sequence[Response], b: Sequence[Response], name_a: str = "a", name_b: str = "b") -> Complement:
    """Compare the responses of two policies to the same problems, one response per problem.

    Raises `ValueError` for different problems, several samples of a problem, and too few problems for any
    difference to be beyond noise.
    """
    pairs = pair_responses(a, b, name_a, name_b)
    n = len(pairs)
    validate_enough_problems(n)
    by_rate = {rate: [(getattr(x, key), getattr(y, key)) for x, y in pairs] for rate, key in FIELDS.items()}
    strict = cross(by_rate["answer"])
    return Complement(
        **vars(strict),
        n=n,
        format=_difference(by_rate["format"]),
        answer=_difference(by_rate["answer"]),
        lenient=_difference(by_rate["lenient"]),
        truncated=_difference(by_rate["truncated"]),
        mean_length=MeanDifference(
            a=mean_estimate([x.length for x, _ in pairs]),
            b=mean_estimate([y.length for _, y in pairs]),
            b_minus_a=mean_estimate([y.length - x.length for x, y in pairs]),
        ),
        lenient_cross=cross(by_rate["lenient"]),
        noise=difference_from_noise(n, (strict.only_a + strict.only_b) / n),
    )


def cross(outcomes: Sequence[tuple[bool, bool]]) -> Cross:
    """Count problems by which of two policies has them right, from a pair of outcomes of each."""
    n = len(outcomes)
    both, only_a, only_b = (outcomes.count(pair) for pair in ((True, True), (True, False), (False, True)))
    return Cross(
        both,
        only_a,
        only_b,
        n - both - only_a - only_b,
        wilson_estimate(only_a + only_b, n),
        wilson_estimate(both + only_a + only_b, n),
    )


def validate_enough_problems(n: int) -> None:
    """Raise `ValueError` for too few problems for any difference to be beyond noise."""
    if mcnemar_exact(n, 0) > 1 - CONFIDENCE:
        raise ValueError(
            f"with {n} problems no difference can be beyond noise, not even {n} to 0 (McNemar's exact test: "
            f"p = {mcnemar_exact(n, 0):.2g}); raise eval_limit, the paper has 200"
        )


def pair_responses(
    a: Sequence[Response], b: Sequence[Response], name_a: str, name_b: str
) -> list[tuple[Response, Response]]:
    """The responses of both, problem by problem. Raises `ValueError` where their problems differ."""
    by_problem = []
    for name, responses in ((name_a, a), (name_b, b)):
        problems = {response.problem: response for response in responses}
        if len(problems) < len(responses):
            raise ValueError(
                f"{name} holds several samples of one problem; a paired comparison needs one response each, so "
                "evaluate greedily"
            )
        by_problem.append(problems)
    first, second = by_problem
    if first.keys() != second.keys():
        raise ValueError(
            f"different problem sets: {name_a} holds {_describe(first)}, {name_b} {_describe(second)}; evaluate "
            "both with the same --eval_limit, to the end"
        )
    for i in first:
        for key in ("prompt", "gold"):
            x, y = getattr(first[i], key), getattr(second[i], key)
            if x != y:
                raise ValueError(
                    f"different problem sets: the {key} of problem {i} is {x[:80]!r} in {name_a} and "
                    f"{y[:80]!r} in {name_b}; evaluate both with the same --task, --data, --split_seed "
                    "and --template"
                )
    return [(first[i], second[i]) for i in first]


def _describe(problems: Mapping[int, Response]) -> str:
    return f"{len(problems)} problems ({min(problems)} to {max(problems)})" if problems else "none"


def _difference(pairs: Sequence[tuple[bool, bool]]) -> Difference:
    n, only_a, only_b = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    return Difference(
        a=wilson_estimate(sum(a for a, _ in pairs), n),
        b=wilson_estimate(sum(b for _, b in pairs), n),
        b_minus_a=paired_rates(only_a, only_b, n),
        p_value=mcnemar_exact(only_a, only_b),
    )
