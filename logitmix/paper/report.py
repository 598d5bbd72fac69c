"""The report of a reproduction: claims, tables and figures of arXiv 2605.20555, from the rows of `results.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from logitmix.evaluation.report.curves import PANELS, Arm, Panel, arms_of, panel_lines, read_run
from logitmix.evaluation.report.figures import plot_panel, plot_sweep
from logitmix.evaluation.report.pages import reproduction_page
from logitmix.evaluation.report.tables import interval, percent
from logitmix.paper.claims import findings
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import PAPER_CELLS, TITLES
from logitmix.paper.tables import (
    SweepCells,
    Table,
    arms_table,
    complement_tables,
    signed,
    sweep_cells,
    sweep_table,
)
from logitmix.paper.verdicts import Finding

RESULTS_FILE = "results.jsonl"
# The paper's figures: each compares fixed mixing with one other arm
FIGURES = {
    "figure-2": ("grpo_kl", "Figures 2, 4, 5: fixed mixing and GRPO+KL"),
    "figure-3": ("grpo", "Figure 3: fixed mixing and GRPO without KL"),
    "figure-6": ("adaptive_mixing", "Figures 6, 7: fixed and adaptive weight"),
    "figure-8": ("base_anchor", "Figure 8: the SFT model and the base as the anchor"),
    "figure-9": ("prob_mixing", "Figure 9: logit mixing and probability mixing"),
}
SIGNS = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
# Panels of `logitmix report` that are not among the paper's figures, and their arms
BESIDE = {"alpha": ("fixed_mixing", "adaptive_mixing"), "reward": tuple(TITLES)}


def write_reproduction(folder: Path, rows: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Path]]) -> None:
    """Write `results.jsonl`, `claims.json`, the figures, `README.md` and `index.html` into the folder.

    The first row says what was run; `runs` has the training runs of every arm, a folder a seed.
    """
    outcomes = Outcomes(rows)
    found = findings(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "claims.json").write_text(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    arms = {
        arm: arms_of(replace(read_run(str(path))[0], label=TITLES[arm]) for path in paths)[0]
        for arm, paths in runs.items()
    }
    cells = sweep_cells(outcomes)
    figures = draw(folder, cells, arms)
    tables = [*complement_tables(outcomes), sweep_table(cells), arms_table(outcomes)]
    about, notes = rows[0], notes_on(outcomes)
    readme = markdown(about, found, notes, tables, figures)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    svgs = {name: (folder / f"{name}.svg").read_text(encoding="utf-8") for name in figures}
    shown = [asdict(f) | {"here": measured(f), "rates": rates_of(f), "sign": SIGNS[f.verdict]} for f in found]
    page = reproduction_page(
        about=about,
        made_on=made_on(about),
        counts=counts(found),
        findings=shown,
        notes=notes,
        tables=tables,
        svgs=svgs,
        others=[cell.replace("/", "-") for cell in PAPER_CELLS if cell != about["cell"]],
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def draw(folder: Path, cells: SweepCells, arms: Mapping[str, Arm]) -> dict[str, str]:
    """The figures, PNG and SVG; their titles by file name."""
    accuracy = next(panel for panel in PANELS if panel.file == "answer")
    titles = {}
    for name, (other, title) in FIGURES.items():
        _plot(replace(accuracy, file=name, title=title), [arms["fixed_mixing"], arms[other]], folder)
        titles[name] = title
    sweep = [{"scheme": scheme, "alpha": alpha, **rates} for (scheme, alpha), rates in cells.items()]
    titles["table-4"] = "Table 4: mixing the untrained base with its SFT model"
    plot_sweep(sweep, titles["table-4"], *(folder / f"table-4.{suffix}" for suffix in ("png", "svg")))
    for panel in PANELS:
        if panel.file in BESIDE and _plot(panel, [arms[arm] for arm in BESIDE[panel.file]], folder):
            titles[panel.file] = panel.title
    return titles


def _plot(panel: Panel, arms: Sequence[Arm], folder: Path) -> bool:
    lines = panel_lines(panel, arms)
    if lines:
        plot_panel(panel, lines, *(folder / f"{panel.file}.{suffix}" for suffix in ("png", "svg")))
    return bool(lines)


def notes_on(o: Outcomes) -> list[str]:
    """How to read the verdicts."""
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


def counts(found: Sequence[Finding]) -> str:
    """`9 claims hold, 3 do not hold, 2 are undecided`."""
    numbers = [sum(finding.verdict == verdict for finding in found) for verdict in SIGNS]
    return "{} of {} claims hold, {} do not, {} are undecided".format(numbers[0], len(found), *numbers[1:])


def measured(finding: Finding) -> str:
    """The number that decides, with its interval."""
    e = finding.estimate
    if finding.unit == "points":
        return f"{signed(e)} points"
    if finding.unit == "share":
        return f"{interval(e)} %"
    return f"{e.value:.2g} [{e.low:.2g}, {e.high:.2g}]"  # a verdict may hang on less than a hundredth


def rates_of(finding: Finding) -> str:
    return ", ".join(f"{name}: {percent(value)} %" for name, value in finding.rates.items())


def made_on(about: Mapping[str, Any]) -> str:
    """Time, hardware and versions, in a line."""
    devices = ", ".join(about["devices"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    commit = f", commit {about['git']['commit'][:12]}{' (changed)' * about['git']['dirty']}" if about["git"] else ""
    return (
        f"{about['processor']['count']} cores of {about['processor']['name']}, {devices}; {about['platform']}; "
        f"{about['seconds'] / 60:.0f} min; Python {about['python']}, {versions}{commit}"
    )


def markdown(
    about: Mapping[str, Any],
    found: Sequence[Finding],
    notes: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, str],
) -> str:
    """The report as Markdown, its figures beside it."""
    claims = Table(
        "",
        ["claim", "the paper", "here", "verdict"],
        [
            [
                f"**{f.claim}** ({f.source}). {f.measure[0].upper()}{f.measure[1:]}.",
                f.paper,
                f"{measured(f)} ({rates_of(f)})",
                f"{SIGNS[f.verdict]} {f.verdict}",
            ]
            for f in found
        ],
        rule="---",
    )
    return "\n".join(
        [
            f"# The paper's claims at the scale `{about['scale']}`\n",
            f"{about['about']}. Written by `{about['command']}`; "
            "[index.html](index.html) is the same as one page, [results.jsonl](results.jsonl) has every number.\n",
            f"**{counts(found)}.**",
            claims.markdown().removeprefix("### \n"),
            *(f"- {note}" for note in notes),
            "\n## Tables\n",
            *(table.markdown() for table in tables),
            "## Figures\n",
            "Lines are means over seeds, bands go from the lowest seed to the highest.\n",
            *(f"![{title}]({name}.png)\n" for name, title in figures.items()),
            f"## Made on\n\n{made_on(about)}.",
            "",
        ]
    )
