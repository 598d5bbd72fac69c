"""What a set of graded responses adds up to. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


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
