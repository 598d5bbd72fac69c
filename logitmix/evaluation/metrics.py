"""Rates of graded responses, with intervals, and pass@k. Pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from logitmix.evaluation.requests import Response
from logitmix.evaluation.statistics import Estimate, mean_estimate, paired_bootstrap, pass_at_k, wilson_estimate

# The field of a response behind each rate
FIELDS = {"format": "format_ok", "answer": "answer_ok", "lenient": "lenient_ok", "truncated": "truncated"}


@dataclass(frozen=True)
class Rates:
    """Shares of n responses, in [0, 1].

    `format`: in the required format. `answer`: in the format **and** right, the paper's accuracy. `lenient`: right
    anywhere in the text; reported, never a reward. `truncated`: ended by the length limit. `mean_length` is in tokens.
    """

    n: int
    format: float
    answer: float
    lenient: float
    truncated: float
    mean_length: float


def rates(responses: Iterable[Response]) -> Rates:
    """Rates of graded responses. Raises `ValueError` if there are none."""
    graded = list(responses)
    if not graded:
        raise ValueError("there are no responses to compute rates of; evaluate at least one problem")

    def mean(key: str) -> float:
        return sum(float(getattr(response, key)) for response in graded) / len(graded)

    return Rates(
        n=len(graded),
        format=mean("format_ok"),
        answer=mean("answer_ok"),
        lenient=mean("lenient_ok"),
        truncated=mean("truncated"),
        mean_length=mean("length"),
    )


def group_by(responses: Iterable[Response], key: str) -> dict[Any, list[Response]]:
    """The responses for each value of a field, in the order in which the values first appear."""
    groups: dict[Any, list[Response]] = {}
    for response in responses:
        groups.setdefault(getattr(response, key), []).append(response)
    return groups


def rates_by(responses: Iterable[Response], key: str) -> dict[Any, Rates]:
    """Rates for each value of a field, in the order in which the values first appear."""
    return {value: rates(group) for value, group in group_by(responses, key).items()}


def estimate(responses: Iterable[Response], key: str) -> Estimate:
    """The share of responses whose `key` is true (`"format_ok"`, `"answer_ok"`, …), with its 95 % interval.

    Wilson's interval with one response per problem. Several samples of a problem are not independent, so their
    interval is a bootstrap over problems.
    """
    shares = [sum(values) / len(values) for values in _by_problem(responses, key).values()]
    if not shares:
        raise ValueError("there are no responses to compute a rate of; evaluate at least one problem")
    if all(share in (0, 1) for share in shares):
        return wilson_estimate(int(sum(shares)), len(shares))
    return paired_bootstrap(shares, [0.0] * len(shares))


def estimates(responses: Iterable[Response]) -> dict[str, Estimate]:
    """Every rate of `Rates` and the mean length, each with its 95 % interval, under their names there."""
    graded = list(responses)
    found = {rate: estimate(graded, field) for rate, field in FIELDS.items()}
    by_problem = group_by(graded, "problem").values()
    lengths = [sum(sample.length for sample in samples) / len(samples) for samples in by_problem]
    return found | {"mean_length": mean_estimate(lengths)}


def pass_rates(responses: Iterable[Response]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, … up to the number of samples per problem; pass@1 of n samples is avg@n.

    Raises `ValueError` where problems differ in their number of samples.
    """
    problems = list(_by_problem(responses, "answer_ok").values())
    counts = {len(values) for values in problems}
    if len(counts) != 1:
        raise ValueError(
            f"problems have {sorted(counts)} samples, but pass@k needs equally many of each; finish the evaluation"
        )
    (n,) = counts
    ks = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    return {k: sum(pass_at_k(n, sum(values), k) for values in problems) / len(problems) for k in ks}


def validate_num_samples(num_samples: int, temperature: float) -> None:
    """Raise `ValueError` for fewer than one sample, and for several samples at temperature 0."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, but must be at least 1")
    if num_samples > 1 and temperature == 0:
        raise ValueError(
            f"num_samples is {num_samples}, but at temperature 0 they would all be the same; give --temperature, 1.0 "
            "for instance"
        )


def _by_problem(responses: Iterable[Response], key: str) -> dict[int, list[bool]]:
    by_problem = group_by(responses, "problem")
    return {problem: [bool(getattr(sample, key)) for sample in samples] for problem, samples in by_problem.items()}
