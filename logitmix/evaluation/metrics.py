"""What a set of graded responses adds up to. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from logitmix.evaluation.statistics import Estimate, paired_bootstrap, pass_at_k, wilson_interval


@dataclass(frozen=True)
class Rates:
    """Shares of n responses, in [0, 1].

    `format`: the answer stands in the required template. `answer`: in the template **and** right, the paper's
    accuracy. `lenient`: right wherever it stands; reported beside, never a reward. `truncated`: cut by the limit.
    """

    n: int
    format: float
    answer: float
    lenient: float
    truncated: float
    mean_length: float


def rates(responses: Iterable[Mapping[str, Any]]) -> Rates:
    """Rates of graded responses (lines of an evaluation file). Raises `ValueError` for none at all."""
    rows = list(responses)
    if not rows:
        raise ValueError("there are no responses to take rates of; evaluate at least one problem")

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    return Rates(
        n=len(rows),
        format=mean("format_ok"),
        answer=mean("answer_ok"),
        lenient=mean("lenient_ok"),
        truncated=mean("truncated"),
        mean_length=mean("length"),
    )


def rates_by(responses: Iterable[Mapping[str, Any]], key: str) -> dict[Any, Rates]:
    """Rates for each value of a column, in the order in which the values first appear."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in responses:
        groups.setdefault(row[key], []).append(row)
    return {value: rates(rows) for value, rows in groups.items()}


def estimate(responses: Iterable[Mapping[str, Any]], key: str) -> Estimate:
    """The share of responses of which `key` holds (`"format_ok"`, `"answer_ok"`, …), with its 95 % interval.

    Wilson's for one response a problem. Several samples of one problem are not independent: then a bootstrap over
    problems.
    """
    shares = [sum(values) / len(values) for values in _by_problem(responses, key).values()]
    if not shares:
        raise ValueError("there are no responses to take a rate of; evaluate at least one problem")
    if all(share in (0, 1) for share in shares):
        return Estimate(sum(shares) / len(shares), *wilson_interval(int(sum(shares)), len(shares)))
    return paired_bootstrap(shares, [0.0] * len(shares))


def pass_rates(responses: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, … up to the samples that each problem has; pass@1 of n samples is avg@n.

    Raises `ValueError` where some problems have more samples than others.
    """
    problems = list(_by_problem(responses, "answer_ok").values())
    counts = {len(values) for values in problems}
    if len(counts) != 1:
        raise ValueError(f"problems have {sorted(counts)} samples; pass@k needs as many of each; finish it first")
    (n,) = counts
    ks = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    return {k: sum(pass_at_k(n, sum(values), k) for values in problems) / len(problems) for k in ks}


def check_pass_at(num_samples: int, temperature: float) -> None:
    """Refuse samples that would all be one and the same, or none."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, but must be at least 1")
    if num_samples > 1 and temperature == 0:
        raise ValueError(
            f"num_samples is {num_samples}, but at temperature 0 they would all be the same; give --temperature, 1.0 "
            "for instance"
        )


def _by_problem(responses: Iterable[Mapping[str, Any]], key: str) -> dict[int, list[bool]]:
    problems: dict[int, list[bool]] = {}
    for row in responses:
        problems.setdefault(row["problem"], []).append(bool(row[key]))
    return problems
