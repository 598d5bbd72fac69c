"""The paper's tables 1 to 4 and a table of all arms, from the outcomes of a reproduction.

Shape legend: S seeds, N problems.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitmix.evaluation.outcomes import KEYS
from logitmix.evaluation.report.tables import interval, p_value, percent
from logitmix.evaluation.report.text_table import TextTable
from logitmix.evaluation.statistics import (
    Estimate,
    difference_from_noise,
    mcnemar_exact,
    paired_difference,
    paired_rates,
    wilson_estimate,
)
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import EXTRA_TITLES, TITLES

SweepCells = dict[tuple[str, float], dict[str, float]]
SeedScores = dict[str, NDArray[Any]]  # `[S, N]` by key
ALL = "all"  # the row of all seeds


def complement_tables(o: Outcomes) -> list[TextTable]:
    """Tables 1 to 3: the SFT model and the policy of fixed mixing after training, a row for each seed and for all."""
    last = o.steps("fixed_mixing")[-1]
    sft = {key: o.anchor_scores(key) for key in KEYS}
    policy = {key: o.member_scores("fixed_mixing", "policy", last, key) for key in KEYS}
    rates, differences, disagreements = [], [], []
    for name, rows in {
        **{f"seed {seed}": slice(i, i + 1) for i, seed in enumerate(o.seeds)},
        ALL: slice(None),
    }.items():
        a, b = ({key: scores[rows] for key, scores in scores_by_key.items()} for scores_by_key in (sft, policy))
        rate, difference, disagreement = _complement_rows(name, a, b)
        rates.append(rate)
        differences.append(difference)
        disagreements.append(disagreement)
    columns = ["", *(f"{what} {whose} %" for what in ("format", "answer", "lenient") for whose in ("SFT", "policy"))]
    return [
        TextTable(
            "Table 1: the SFT model and the policy alone after fixed mixing",
            [*columns, "both", "policy only", "SFT only", "neither"],
            rates,
            f"{o.n} held-out problems, greedy; counts are of answer-correct problems. lenient: correct in any "
            "format, which the paper does not report.",
        ),
        TextTable(
            "Table 2: their differences in points",
            ["", "format, SFT - policy", "answer, policy - SFT", "lenient, policy - SFT", "p (answer)"],
            differences,
            "p: McNemar's exact test. [ ]: 95 %; for a seed it excludes 0 where p < 0.05, for all of them it is a "
            "bootstrap over problems and seeds.",
        ),
        TextTable(
            "Table 3: problems that exactly one of them has right",
            ["", "problems", "share %", "smallest difference beyond noise, points"],
            disagreements,
            "With so many problems and this disagreement, smaller differences of the answer rates are within noise.",
        ),
    ]


def _complement_rows(name: str, a: SeedScores, b: SeedScores) -> tuple[list[str], list[str], list[str]]:
    """The rows of tables 1 to 3, from the scores of the SFT model (`a`) and the policy (`b`), of a seed or of all."""
    right_a, right_b = a["answer_ok"], b["answer_ok"]
    both, only_b, only_a, neither = (
        int(((right_a == x) & (right_b == y)).sum()) for x, y in ((1, 1), (0, 1), (1, 0), (0, 0))
    )
    shares = [percent(scores[key].mean()) for key in KEYS for scores in (a, b)]
    difference = paired_difference if name == ALL else _one_seed_difference
    gaps = (
        difference(a["format_ok"], b["format_ok"]),
        difference(right_b, right_a),
        difference(b["lenient_ok"], a["lenient_ok"]),
    )
    disagreement = (only_a + only_b) / right_a.size
    p, smallest = "", ""
    if name != ALL:
        noise = difference_from_noise(right_a.size, disagreement)
        p, smallest = p_value(mcnemar_exact(only_a, only_b)), percent(noise) if noise <= 1 else "none is"
    return (
        [name, *shares, *map(str, (both, only_b, only_a, neither))],
        [name, *map(signed, gaps), p],
        [name, str(only_a + only_b), percent(disagreement), smallest],
    )


def _one_seed_difference(a: NDArray[Any], b: NDArray[Any]) -> Estimate:
    """`a - b` of the scores of one seed, `[1, N]` of 0 and 1."""
    return paired_rates(int((b > a).sum()), int((a > b).sum()), a.size)


def sweep_cells(o: Outcomes) -> SweepCells:
    """Format and answer rates of the untrained pair with their intervals, by scheme and alpha."""
    cells: SweepCells = {}
    for scheme in ("logit", "prob", "merge"):
        for alpha in o.alphas(scheme):
            cells[scheme, alpha] = {}
            for key in ("format", "answer"):
                found = _rate(o.sweep_scores(scheme, alpha, f"{key}_ok"))
                cells[scheme, alpha] |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return cells


def sweep_table(cells: SweepCells) -> TextTable:
    """Table 4: means over seeds with intervals; the best answer rate of each scheme is bold."""
    schemes, alphas = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True))
    best = {scheme: max(alphas, key=lambda alpha: cells[scheme, alpha]["answer"]) for scheme in schemes}
    rows = []
    for alpha in alphas:
        row = [f"{alpha:g}"]
        for scheme in schemes:
            cell = cells[scheme, alpha]
            answer = interval(Estimate(cell["answer"], cell["answer_low"], cell["answer_high"]))
            row += [percent(cell["format"]), f"**{answer}**" if alpha == best[scheme] else answer]
        rows.append(row)
    return TextTable(
        "Table 4: mixing the untrained base with its SFT model",
        ["alpha", *(f"{scheme} {what} %" for scheme in schemes for what in ("format", "answer"))],
        rows,
        "Means over seeds; bold: the best answer rate of each. alpha 0 is the base, 1 the SFT model. merge mixes the "
        "weights, which the paper does not.",
    )


def arms_table(o: Outcomes) -> TextTable:
    """Rates of every arm's mixture, or of its model without an anchor, before and after training."""
    rows = []
    for arm, title in TITLES.items():
        first, last = o.steps(arm)[0], o.steps(arm)[-1]
        cells = [percent(o.arm_scores(arm, first).mean())]
        for key in ("answer_ok", "format_ok"):
            scores = o.arm_scores(arm, last, key)
            cells.append(interval(_rate(scores)))
        by_seed = o.arm_scores(arm, last).mean(axis=1)
        rows.append([title, *cells, ", ".join(map(percent, by_seed))])
    return TextTable(
        "All arms: the mixture, or the model where there is no anchor",
        ["", "answer % before", "answer % after", "format % after", "answer % after, by seed"],
        rows,
        f"{o.n} held-out problems, greedy.",
    )


def one_model_tables(o: Outcomes) -> list[TextTable]:
    """The arms beyond the paper, which end with one model, beside fixed mixing; no table if none was run."""
    mixture = o.arm_scores("fixed_mixing", o.steps("fixed_mixing")[-1])
    rows = []
    for arm, title in EXTRA_TITLES.items():
        if o.steps(arm):
            scores = o.single_model_scores(arm)
            cells = [interval(_rate(s)) for s in (scores, o.single_model_scores(arm, "format_ok"))]
            by_seed = ", ".join(map(percent, scores.mean(axis=1)))
            rows.append([title, *cells, signed(paired_difference(scores, mixture)), by_seed])
    columns = ["", "answer % after", "format % after", "minus fixed mixing, points", "answer % after, by seed"]
    note = f"{o.n} held-out problems, greedy, decoded by one model. Fixed mixing is its mixture of two."
    return [TextTable("Beyond the paper: one model in the end", columns, rows, note)] if rows else []


def _rate(scores_SN: NDArray[np.float64]) -> Estimate:
    """The mean with its interval: Wilson's for one seed, a bootstrap over problems and seeds for several."""
    if len(scores_SN) == 1:
        return wilson_estimate(int(scores_SN.sum()), scores_SN.size)
    found = paired_difference(scores_SN, np.zeros_like(scores_SN))
    return Estimate(found.value, max(0.0, found.low), found.high)


def signed(estimate: Estimate) -> str:
    """`+8.5 [+3.0, +14.0]`, in per cent."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
