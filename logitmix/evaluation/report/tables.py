"""Tables of evaluations in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logitmix.evaluation.complement import Complement
from logitmix.evaluation.explanations import explain
from logitmix.evaluation.metrics import Rates, estimate, estimates, group_by, pass_rates, rates
from logitmix.evaluation.report.pages import visible
from logitmix.evaluation.requests import Response
from logitmix.evaluation.statistics import Estimate
from logitmix.evaluation.sweep import Choice

if TYPE_CHECKING:  # reports need no torch
    from logitmix.evaluation.openings import Opening
    from logitmix.evaluation.realignment import Prediction
    from logitmix.evaluation.template_trials import Trial
    from logitmix.evaluation.weights_sweep import WeightsChoice

# Rates in the order of the tables, by their names in `Rates`
MEASURES = {
    "format": "format %",
    "answer": "answer %",
    "lenient": "lenient %",
    "truncated": "cut %",
    "mean_length": "tokens",
}
RATE_COLUMNS = tuple(MEASURES.values())
MARGIN = "margin: of the format's weakest opening token over the next best token, in nats, after a worked solution"


def print_rates(title: str, rates: Mapping[str, Rates]) -> None:
    """Print a row for each name: format-correct, answer-correct, lenient, truncated, and length in tokens."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in RATE_COLUMNS:
        table.add_column(column, justify="right")
    for name, r in rates.items():
        shares = map(percent, (r.format, r.answer, r.lenient, r.truncated))
        table.add_row(name, *shares, f"{r.mean_length:.1f}")
    Console().print(table)


def print_sweep(title: str, sweep: Sequence[Mapping[str, Any]]) -> None:
    """Print format and answer rates by alpha, from rows of `scheme`, `alpha` and rates."""
    schemes = list(dict.fromkeys(row["scheme"] for row in sweep))
    table = Table(title=title, title_justify="left")
    table.add_column("alpha", justify="right")
    for scheme in schemes:
        table.add_column(f"{scheme}\nformat %", justify="right")
        table.add_column(f"{scheme}\nanswer %", justify="right")
    for alpha in dict.fromkeys(row["alpha"] for row in sweep):
        cells = [row for scheme in schemes for row in sweep if row["scheme"] == scheme and row["alpha"] == alpha]
        table.add_row(f"{alpha:.1f}", *(f"{100 * row[key]:.1f}" for row in cells for key in ("format", "answer")))
    Console().print(table)


def print_evaluation(title: str, responses: Sequence[Response]) -> None:
    """Print the rates of each name with 95 % intervals, and pass@k if there are several samples per problem."""
    groups = group_by(responses, "name")
    table = Table(title=title, title_justify="left", caption="[ ]: 95 % interval", caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in RATE_COLUMNS:
        table.add_column(column, justify="right")
    for name, group in groups.items():
        r = rates(group)
        cells = [interval(estimate(group, key)) for key in ("format_ok", "answer_ok")]
        table.add_row(name, *cells, percent(r.lenient), percent(r.truncated), f"{r.mean_length:.1f}")
    Console().print(table)
    print_notes(explain(responses))
    passes = {name: pass_rates(group) for name, group in groups.items()}
    ks = list(next(iter(passes.values())))
    if len(ks) == 1:
        return
    table = Table(title=f"pass@k, from {ks[-1]} samples of each problem, %", title_justify="left")
    table.add_column("", no_wrap=True)
    for k in ks:
        table.add_column(f"pass@{k}" if k > 1 else f"pass@1, avg@{ks[-1]}", justify="right")
    for name, rate_at in passes.items():
        table.add_row(name, *(percent(rate_at[k]) for k in ks))
    Console().print(table)


def print_points(title: str, responses: Sequence[Response]) -> None:
    """Print every rate of each name, and the mean length, with 95 % intervals, and what explains low rates."""
    rows = []
    for name, group in group_by(responses, "name").items():
        found = estimates(group)
        shares = [interval(found[key]) for key in MEASURES if key != "mean_length"]
        rows.append([name, *shares, mean_interval(found["mean_length"])])
    print_rows(title, ["", *RATE_COLUMNS], rows)
    print_notes(["[ ]: 95 % interval", *explain(responses)])


def print_trial_rates(title: str, trials: Sequence[Trial]) -> None:
    """Print the rates of each template that was tried, and the margin of its opening's weakest token."""
    table = Table(title=title, title_justify="left", caption=MARGIN, caption_justify="left")
    table.add_column("template", no_wrap=True)
    for column in (*RATE_COLUMNS, "margin", "of"):
        table.add_column(column, justify="right" if column != "of" else "left")
    for trial in trials:
        if trial.refusal is None:
            r = rates(trial.responses)
            shares = map(percent, (r.format, r.answer, r.lenient, r.truncated))
            margin = ("", "") if trial.margin is None else (f"{trial.margin.nats:+.1f}", visible(trial.margin.token))
            table.add_row(trial.template, *shares, f"{r.mean_length:.1f}", margin[0], Text(margin[1]))
    Console().print(table)


def print_complement(c: Complement, name_a: str, name_b: str, notes: Sequence[str] = ()) -> None:
    """Print the paper's tables 1 to 3: rates, differences, the cross tables, and whether they are beyond noise."""
    table = Table(
        title=f"A and B on the same {c.n} problems",
        title_justify="left",
        caption="[ ]: 95 % interval; p: McNemar's exact test",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("A", "B", "B - A", "p"):
        table.add_column(column, justify="right")
    for difference, title in zip((c.format, c.answer, c.lenient, c.truncated), MEASURES.values(), strict=False):
        values = map(interval, (difference.a, difference.b, difference.b_minus_a))
        table.add_row(title, *values, p_value(difference.p_value))
    length = c.mean_length
    table.add_row(MEASURES["mean_length"], *map(mean_interval, (length.a, length.b, length.b_minus_a)), "")
    console = Console()
    console.print(table)
    for where, counts in (("in the format", c), ("anywhere in the text", c.lenient_cross)):
        table = Table(title=f"Who is right, {where}", title_justify="left", min_width=38)
        for column in ("", "B right", "B wrong"):
            table.add_column(column, justify="right")
        table.add_row("A right", str(counts.both), str(counts.only_a))
        table.add_row("A wrong", str(counts.only_b), str(counts.neither))
        console.print(table)
    for name, source in (("A", name_a), ("B", name_b)):
        console.print(f"{name}: {source}", soft_wrap=True, markup=False, highlight=False)
    print_notes([*complement_notes(c), *notes])


def print_notes(notes: Sequence[str]) -> None:
    for line in notes:
        Console().print(line, soft_wrap=True, markup=False, highlight=False)


def complement_notes(c: Complement) -> list[str]:
    """The tables in words."""
    gap, p = 100 * c.answer.b_minus_a.value, c.answer.p_value
    verdict = "beyond noise" if p < 0.05 else "within noise"
    smallest = (
        f"differences below {100 * c.noise:.1f} points are within noise"
        if c.noise <= 1
        else "they disagree too rarely for any difference to be beyond noise"
    )
    lenient = c.lenient_cross
    return [
        f"One alone is right on {c.only_a + c.only_b} problems, {interval(c.disagreement)} %; at least one of the two "
        f"on {interval(c.either)} %.",
        f"The answer rates differ by {gap:+.1f} points (B - A), {verdict}: with {c.n} problems and this disagreement, "
        f"{smallest} (95 %).",
        f"Anywhere in the text, one alone is right on {lenient.only_a + lenient.only_b} problems, "
        f"{interval(lenient.disagreement)} %; at least one of the two on {interval(lenient.either)} %.",
    ]


def opening_notes(a: Sequence[Opening], b: Sequence[Opening]) -> list[str]:
    """How surely A and B open the format, and the weights at which their geometric mixture does."""
    from logitmix.evaluation.openings import opening_weights, summarise  # needs torch, and reports do not

    margins = {"A": summarise(a), "B": summarise(b)}
    parts = [f"{who} {margin.nats:+.1f} nats at {visible(margin.token)!r}" for who, margin in margins.items()]
    line = f"Margin of the format's weakest opening token, after a worked solution: {', '.join(parts)}."
    weak, strong = sorted(margins, key=lambda who: margins[who].nats)
    weights = opening_weights(*((a, b) if strong == "B" else (b, a)))
    if weights is None:
        return [f"{line} No weight makes sure that a geometric mixture opens it."]
    low, high = weights
    if (low, high) == (0, 1):
        return [f"{line} Both open it by themselves."]
    if high == 1:
        at = f"from a weight of {low:.2f} for {strong} on; {weak} alone does not"
    else:
        at = f"at weights from {low:.2f} to {high:.2f} for {strong}; {strong} alone does not"
    return [f"{line} A geometric mixture opens it {at}."]


def print_sweep_intervals(title: str, sweep: Sequence[Mapping[str, Any]]) -> None:
    """Print the paper's table 4 with intervals: a table of every measure, by alpha and scheme.

    Beside alpha stands by how much it multiplies the beta of a KL penalty, in geometric mixtures.
    """
    schemes = list(dict.fromkeys(row["scheme"] for row in sweep))
    console = Console()
    for key, measure in MEASURES.items():
        table = Table(title=f"{title}: {measure}", title_justify="left")
        table.add_column("alpha", justify="right")
        if "logit" in schemes:
            table.add_column("beta ×", justify="right")
        for scheme in schemes:
            table.add_column(scheme, justify="right")
        for alpha in sorted({row["alpha"] for row in sweep}):
            cells = {row["scheme"]: row for row in sweep if row["alpha"] == alpha}
            as_text = mean_interval if key == "mean_length" else interval
            beta = "∞" if alpha == 1 else f"{1 / (1 - alpha):.3g}" if alpha < 1 else "–"
            table.add_row(
                f"{alpha:g}",
                *([beta] if "logit" in schemes else []),
                *(
                    as_text(Estimate(row[key], row[f"{key}_low"], row[f"{key}_high"])) if row else ""
                    for row in map(cells.get, schemes)
                ),
            )
        console.print(table)


def print_predictions(
    title: str, predictions: Sequence[Prediction], betas: Sequence[float], trained: str = "beta 1 at alpha 0"
) -> None:
    """Print what is expected at each alpha; rates are left out where too few rollouts count.

    `trained` says with which KL penalty and at which alpha the policy was trained.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption=f"beta: of the KL penalty that an alpha corresponds to, after a training with {trained}; KL: to the "
        "anchor, nats a token; n: effective number of rollouts; covered: share of the responses at that alpha that "
        "the rollouts are like; no rates where either is too small",
        caption_justify="left",
    )
    for column in ("alpha", "beta", "KL", "n", "covered %", "format %", "answer %"):
        table.add_column(column, justify="right")
    for p, beta in zip(predictions, betas, strict=True):
        shares = ("–" if rate is None else interval(rate) for rate in (p.format, p.answer))
        table.add_row(f"{p.alpha:g}", f"{beta:.3g}", f"{p.kl:.3f}", f"{p.effective:.0f}", percent(p.covered), *shares)
    Console().print(table)


BETA_NOTE = (
    "beta ×: of a policy trained with a KL penalty beta to this anchor, scheme logit at alpha corresponds to beta / "
    "(1 - alpha); logitmix realign predicts the rates of rollouts at temperature 1."
)


def print_choices(choices: Sequence[Choice]) -> None:
    """Print the best alpha of each mix, chosen on half of the problems and reported on the other half."""
    table = Table(title="Best alpha by answer %, chosen on every second problem", title_justify="left")
    for column in ("", "alpha", "chosen on", "on the others", "policy", "anchor", "p"):
        table.add_column(column, justify="right")
    for c in choices:
        members = (percent(member.value) for member in (c.policy, c.anchor))
        chosen, reported = percent(c.chosen_on.value), interval(c.reported_on)
        table.add_row(c.mix, f"{c.alpha:g}", chosen, reported, *members, p_value(c.p_value))
    console = Console()
    console.print(table)
    console.print("Members and p (McNemar's exact test against the better member): on the others.", highlight=False)


def print_weights_choice(choice: WeightsChoice) -> None:
    """Print the best weights, chosen on half of the problems and reported on the other half."""
    weights = ", ".join(f"{weight:g}" for weight in choice.weights)
    console = Console()
    console.print(
        f"Best by answer %, chosen on every second problem: {choice.name}, with weights {weights}: "
        f"{percent(choice.chosen_on.value)} there.",
        highlight=False,
    )
    console.print(
        f"On the others {interval(choice.reported_on)}, and the best member alone, {choice.best_member}, "
        f"{interval(choice.member)}: p = {p_value(choice.p_value)} (McNemar's exact test).",
        highlight=False,
    )


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text cells; the first column holds names."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:  # put intervals on their own lines, so that they are not broken
        table.add_row(*(Text(cell.replace(" [", "\n[").replace("] ", "]\n")) for cell in row))
    Console().print(table)


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(estimate: Estimate) -> str:
    """An estimate in per cent: `81.5 [76, 86]`."""
    return f"{percent(estimate.value)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def mean_interval(estimate: Estimate) -> str:
    """The estimate of a mean: `85.1 [80, 91]`."""
    return f"{estimate.value:.1f} [{estimate.low:.0f}, {estimate.high:.0f}]"
