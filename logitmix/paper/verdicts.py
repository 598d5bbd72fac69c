"""Findings: a claim, the number that decides it with its interval, and the verdict. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from logitmix.evaluation.statistics import Estimate

Verdict = Literal["holds", "does not hold", "undecided"]
Unit = Literal["points", "share", "alpha"]  # points: a difference of shares

BEYOND = "beyond the paper"  # the source of a claim that is not the paper's
# The largest difference that counts as "comparable"; the paper gives no number
MARGIN = 0.02


@dataclass(frozen=True)
class Finding:
    """A claim and its verdict.

    source:   the paper's section, tables and figures
    paper:    what the paper reports
    measure:  the number that decides, and the condition on it
    estimate: that number and its interval
    rates:    the rates that the number is computed from
    """

    claim: str
    source: str
    paper: str
    measure: str
    estimate: Estimate
    verdict: Verdict
    unit: Unit = "points"
    rates: Mapping[str, float] = field(default_factory=dict)


def above(estimate: Estimate, bound: float = 0.0) -> Verdict:
    """A claim that a number is above a bound: it holds if the whole interval is, and does not if none of it is."""
    if estimate.low > bound:
        return "holds"
    return "does not hold" if estimate.high <= bound else "undecided"


def not_below(estimate: Estimate, margin: float = MARGIN) -> Verdict:
    """A claim of "higher or at least comparable": a difference of at least -margin."""
    if estimate.low >= -margin:
        return "holds"
    return "does not hold" if estimate.high < -margin else "undecided"


def comparable(estimate: Estimate, margin: float = MARGIN) -> Verdict:
    """A claim that two rates are about equal: a difference within ±margin."""
    if -margin <= estimate.low and estimate.high <= margin:
        return "holds"
    return "does not hold" if estimate.low > margin or estimate.high < -margin else "undecided"
