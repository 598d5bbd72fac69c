"""The report of a reproduction: the claims, tables and figures of arXiv 2605.20555, as Markdown and as HTML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from logitmix.evaluation.report.curves import PANELS, Arm, Panel, Run, panel_lines
from logitmix.evaluation.report.figures import plot_panel, plot_sweep
from logitmix.evaluation.report.pages import reproduction_page
from logitmix.evaluation.report.tables import interval, percent
from logitmix.evaluation.report.text_table import TextTable
from logitmix.paper.claims import evaluate_claims
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import PAPER_CELLS, TITLES
from logitmix.paper.tables import (
    SweepCells,
    arms_table,
    complement_tables,
    one_model_tables,
    signed,
    sweep_cells,
    sweep_table,
)
from logitmix.paper.verdicts import BEYOND, Finding

RESULTS_FILE = "results.jsonl"
# The paper's figures: the arm that each compares with fixed mixing, and its title
FIGURES = {
    "figure-2": ("grpo_kl", "Figures 2, 4, 5: fixed mixing and GRPO+KL"),
    "figure-3": ("grpo", "Figure 3: fixed mixing and GRPO without KL"),
    "figure-6": ("adaptive_mixing", "Figures 6, 7: fixed and adaptive weight"),
    "figure-8": ("base_anchor", "Figure 8: the SFT model and the base as the anchor"),
    "figure-9": ("prob_mixing", "Figure 9: logit mixing and probability mixing"),
}
SIGNS = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
# Panels of `logitmix report` that are not figures of the paper, and the arms shown in them
EXTRA_PANELS = {"alpha": ("fixed_mixing", "adaptive_mixing"), "reward": tuple(TITLES)}


def write_report(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.jsonl`, `claims.json`, the figures, `README.md` and `index.html` into the folder.

    `rows` are those of `results.jsonl`; the first describes the reproduction.
    """
    outcomes = Outcomes(rows)
    findings = evaluate_claims(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "claims.json").write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    cells = sweep_cells(outcomes)
    figures = plot_figures(folder, cells, {arm: collect_arm(arm, rows) for arm in TITLES})
    tables = [*complement_tables(outcomes), sweep_table(cells), arms_table(outcomes), *one_model_tables(outcomes)]
    about, notes = rows[0], reading_notes(outcomes)
    readme = markdown(about, findings, notes, tables, figures)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    svgs = {name: (folder / f"{name}.svg").read_text(encoding="utf-8") for name in figures}
    shown = [
        asdict(f) | {"here": format_estimate(f), "rates": format_rates(f), "sign": SIGNS[f.verdict]} for f in findings
    ]
    page = reproduction_page(
        about=about,
        made_on=describe_origins(about),
        counts=count_verdicts(findings),
        findings=shown,
        notes=notes,
        tables=tables,
        svgs=svgs,
        others=[cell.replace("/", "-") for cell in PAPER_CELLS if cell != about["cell"]],
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def collect_arm(arm: str, rows: Sequence[Mapping[str, Any]]) -> Arm:
    """The arm's curves: what was evaluated and logged in each seed."""
    updates = rows[0].get("updates_per_outer_step", 1.0)
    own = [row for row in rows if row.get("arm") == arm]
    runs = []
    for seed in sorted({row["seed"] for row in own}):
        evaluations, metrics = (
            [row for row in own if (row["seed"], row["what"]) == (seed, what)] for what in ("evaluation", "training")
        )
        runs.append(Run(Path(f"seed-{seed}", arm), TITLES[arm], {}, evaluations, metrics, updates))
    return Arm(TITLES[arm], runs)


def plot_figures(folder: Path, cells: SweepCells, arms: Mapping[str, Arm]) -> dict[str, str]:
    """Plot the figures as PNG and SVG; return their titles by file name."""
    accuracy = next(panel for panel in PANELS if panel.file == "answer")
    titles = {}
    for name, (other, title) in FIGURES.items():
        _plot(replace(accuracy, file=name, title=title), [arms["fixed_mixing"], arms[other]], folder)
        titles[name] = title
    sweep = [{"scheme": scheme, "alpha": alpha, **rates} for (scheme, alpha), rates in cells.items()]
    titles["table-4"] = "Table 4: mixing the untrained base with its SFT model"
    plot_sweep(sweep, titles["table-4"], *(folder / f"table-4.{suffix}" for suffix in ("png", "svg")))
    for panel in PANELS:
        if panel.file in EXTRA_PANELS and _plot(panel, [arms[arm] for arm in EXTRA_PANELS[panel.file]], folder):
            titles[panel.file] = panel.title
    return titles


def _plot(panel: Panel, arms: Sequence[Arm], folder: Path) -> bool:
    lines = panel_lines(panel, arms)
    if lines:
        plot_panel(panel, lines, *(folder / f"{panel.file}.{suffix}" for suffix in ("png", "svg")))
    return bool(lines)


def reading_notes(o: Outcomes) -> list[str]:
    """Sentences on how to read the verdicts."""
    seeds = len(o.seeds)
    over = f"{o.n} problems and {seeds} seeds" if seeds > 1 else f"{o.n} problems"
    notes = [
        f"Intervals are 95 %, a paired bootstrap over {over}. A claim holds where all of the interval bears it out, "
        "does not hold where none of it does, and is undecided in between.",
        "These are statements about this scale alone: other models and other tasks may differ.",
    ]
    if seeds == 1:
        notes.insert(1, "One seed says nothing about other seeds: the intervals are too narrow for that.")
    elif seeds < 10:
        notes.insert(1, f"With {seeds} seeds to draw from, the intervals are somewhat too narrow.")
    return notes


def count_verdicts(findings: Sequence[Finding]) -> str:
    """`9 of 16 claims hold, 3 do not, 4 are undecided`: of the paper's claims."""
    verdicts = [finding.verdict for finding in findings if finding.source != BEYOND]
    numbers = [sum(found == verdict for found in verdicts) for verdict in SIGNS]
    return "{} of {} claims hold, {} do not, {} are undecided".format(numbers[0], len(verdicts), *numbers[1:])


def format_estimate(finding: Finding) -> str:
    """The number that decides the claim, with its interval."""
    e = finding.estimate
    if finding.unit == "points":
        return f"{signed(e)} points"
    if finding.unit == "share":
        return f"{interval(e)} %"
    return f"{e.value:.2g} [{e.low:.2g}, {e.high:.2g}]"  # a verdict may depend on less than a hundredth


def format_rates(finding: Finding) -> str:
    return ", ".join(f"{name}: {percent(value)} %" for name, value in finding.rates.items())


def describe_origins(about: Mapping[str, Any]) -> list[str]:
    """Where the seeds were run: a line for this reproduction, and one for each earlier report that it continues."""
    lines = [f"{format_provenance(about)}."]
    while "earlier" in about:
        about = about["earlier"]
        seeds = ", ".join(map(str, about["seeds_taken"]))
        lines.append(f"From an earlier report, seed {seeds}: {format_provenance(about)}.")
    return lines


def format_provenance(about: Mapping[str, Any]) -> str:
    """Hardware, time, versions and commit, in one line."""
    devices = ", ".join(about["devices"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    commit = f", commit {about['git']['commit'][:12]}{' (changed)' * about['git']['dirty']}" if about["git"] else ""
    return (
        f"{about['processor']['count']} cores of {about['processor']['name']}, {devices}; {about['platform']}; "
        f"{about['seconds'] / 60:.0f} min; Python {about['python']}, {versions}{commit}"
    )


def markdown(
    about: Mapping[str, Any],
    findings: Sequence[Finding],
    notes: Sequence[str],
    tables: Sequence[TextTable],
    figures: Mapping[str, str],
) -> str:
    """The report as Markdown; the figures are files in the same folder."""
    claims = TextTable(
        "",
        ["claim", "the paper", "here", "verdict"],
        [
            [
                f"**{f.claim}** ({f.source}). {f.measure[0].upper()}{f.measure[1:]}.",
                f.paper,
                f"{format_estimate(f)} ({format_rates(f)})",
                f"{SIGNS[f.verdict]} {f.verdict}",
            ]
            for f in findings
        ],
        rule="---",
    )
    return "\n".join(
        [
            f"# The paper's claims at the scale `{about['scale']}`\n",
            f"{about['about']}. Written by `{about['command']}`; "
            "[index.html](index.html) is the same as one page, [results.jsonl](results.jsonl) has every number.\n",
            f"**{count_verdicts(findings)}.**",
            f"\n{claims.markdown()}",
            *(f"- {note}" for note in notes),
            "\n## Tables\n",
            *(table.markdown() for table in tables),
            "## Figures\n",
            "Lines are means over seeds, bands go from the lowest seed to the highest.\n",
            *(f"![{title}]({name}.png)\n" for name, title in figures.items()),
            "## Made on\n",
            *(f"{line}\n" for line in describe_origins(about)),
        ]
    )
