"""The report of training runs: a figure for each panel, an HTML page, a CSV file, and a table of the arms."""

import csv
from collections.abc import Sequence
from pathlib import Path

from logitmix.evaluation.report.curves import PANELS, Arm, Run, curve, group_by_arm, panel_keys, panel_lines, points
from logitmix.evaluation.report.figures import plot_panel
from logitmix.evaluation.report.pages import report_page
from logitmix.evaluation.report.tables import interval, print_notes, print_rows
from logitmix.evaluation.statistics import Estimate, wilson_interval

COLUMNS = ("arm", "seeds", "step", "first answer %", "last answer %", "best answer %", "last format %")
MISSING = "–"


def select_drawn(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """The arms of the runs that are drawn, and a line for each run that is left out, or whose curves are missing.

    Left out are runs that have logged nothing, and those without rewards and evaluations, as of SFT, unless they are
    named themselves. Raises `ValueError` if no run is drawn.
    """
    drawn, notes = [], []
    for run in runs:
        if not run.is_drawn:
            notes.append(f"{run.folder} has logged nothing yet, and is left out.")
        elif not run.named and not run.trains_by_reward:
            notes.append(f"{run.folder} has neither rewards nor evaluations, and is left out; name it to draw it.")
        else:
            drawn.append(run)
            if not run.evaluations:
                is_training = run.arguments.get("command", "train") == "train"
                way_out = "; --eval_every STEPS of logitmix train makes them" if is_training else ""
                notes.append(f"{run.folder} has no evaluations, so its held-out curves are missing{way_out}.")
    if not any(run.is_drawn for run in runs):
        folders = ", ".join(str(run.folder) for run in runs)
        raise ValueError(f"{folders}: nothing is logged there yet; wait for the first step or evaluation")
    if not drawn:
        raise ValueError(f"nothing can be drawn: {' '.join(notes)}")
    return group_by_arm(drawn), notes


def write_training_report(folder: Path, title: str, arms: Sequence[Arm], notes: Sequence[str] = ()) -> int:
    """Write the figures, `report.csv` and `report.html` into the folder, print the table, and count the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for panel in PANELS:
        lines = panel_lines(panel, arms)
        if lines:
            png, svg = (folder / f"{panel.file}.{suffix}" for suffix in ("png", "svg"))
            plot_panel(panel, lines, png, svg)
            svgs[panel.file] = svg.read_text(encoding="utf-8")
    rows = [summarise(arm) for arm in arms]
    write_csv(folder / "report.csv", arms)
    (folder / "report.html").write_text(report_page(title, COLUMNS, rows, svgs, notes), encoding="utf-8")
    print_rows(title, COLUMNS, rows)
    print_notes(notes)
    return len(svgs)


def summarise(arm: Arm) -> list[str]:
    """A row of the table: answer rates at the first, the last and the best step, and the format rate at the last.

    An arm without evaluations has no rates.
    """
    named = [arm.label, str(len(arm.runs)), ", ".join(dict.fromkeys(run.progress for run in arm.runs))]
    answers, formats = curve(arm, "main", "answer"), curve(arm, "main", "format")
    if answers is None or formats is None:
        return named + [MISSING] * (len(COLUMNS) - len(named))
    best = max(range(len(answers.steps)), key=lambda i: answers.mean[i])

    def cell(values: tuple[float, float, float]) -> str:
        if answers.seeds == 1:
            n = next(row["n"] for run in arm.runs for row in run.evaluations if row["name"] == run.name)
            return interval(Estimate(values[0], *wilson_interval(round(values[0] * n), n)))
        return interval(Estimate(*values))

    at = list(zip(answers.mean, answers.low, answers.high, strict=True))
    return [
        *named,
        cell(at[0]),
        cell(at[-1]),
        f"{cell(at[best])} at {answers.steps[best]:g}",
        cell((formats.mean[-1], formats.low[-1], formats.high[-1])),
    ]


def write_csv(path: Path, arms: Sequence[Arm]) -> None:
    """Write every number of every panel: a line for each run, quantity and step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "run", "seed", "of", "quantity", "outer_step", "value"])
        for arm in arms:
            for run in arm.runs:
                for panel in PANELS:
                    source = panel.source if panel.source != "main" else run.name or panel.source
                    for key in panel_keys(panel, [run]):
                        for step, value in points(run, panel.source, key).items():
                            seed = run.arguments.get("seed", "")
                            writer.writerow([arm.label, run.folder, seed, source, key, f"{step:g}", repr(value)])
