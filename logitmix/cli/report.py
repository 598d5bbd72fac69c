"""`logitmix report RUN [RUN …]`: curves of training runs as figures, a page and a table (figures 2 to 9)."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.parser import parse
from logitmix.cli.options.validation import validate_distinct
from logitmix.evaluation.report.curves import PANELS, Arm, arms_of, curve, panel_lines, points, read_run
from logitmix.evaluation.report.figures import plot_panel
from logitmix.evaluation.report.pages import report_page
from logitmix.evaluation.report.tables import interval, print_rows
from logitmix.evaluation.statistics import Estimate, wilson_interval
from logitmix.runs.folder import HELD, console

COLUMNS = ("arm", "seeds", "step", "first answer %", "last answer %", "best answer %", "last format %")


@dataclass
class ReportArguments:
    """The runs to report, and the folder of the report."""

    runs: list[str] = field(
        metadata={
            "help": "Folders of runs, or folders that hold several; NAME=FOLDER names an arm. Runs that differ "
            "only in the seed, or have the same name, form one arm."
        }
    )
    output_dir: str = field(default="report", metadata={"help": "Folder of the report, which is overwritten."})
    title: str = field(default="Training runs", metadata={"help": "Title of the page."})


def main(argv: Sequence[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    (args,) = parse("logitmix report RUN [RUN …]", "The curves of training runs.", (ReportArguments,), argv)
    folder = Path(args.output_dir)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; --output_dir must be a folder")
    held = next((name for name in HELD if list(folder.glob(name))), None)
    if held is not None:
        raise ValueError(
            f"{folder} holds a run or a model ({held}); give the report its own folder: {folder / 'report'}"
        )
    validate_distinct(args.runs, "run")
    arms = arms_of(run for source in args.runs for run in read_run(source))
    folder.mkdir(parents=True, exist_ok=True)
    svgs = {}
    for panel in PANELS:
        lines = panel_lines(panel, arms)
        if lines:
            png, svg = (folder / f"{panel.file}.{suffix}" for suffix in ("png", "svg"))
            plot_panel(panel, lines, png, svg)
            svgs[panel.file] = svg.read_text(encoding="utf-8")
    rows = [summary(arm) for arm in arms]
    write_csv(folder / "report.csv", arms)
    page = folder / "report.html"
    page.write_text(report_page(args.title, COLUMNS, rows, svgs), encoding="utf-8")
    print_rows(args.title, COLUMNS, rows)
    console.print(f"{page}, report.csv and {len(svgs)} figures (PNG and SVG) are in {folder}.", soft_wrap=True)


def summary(arm: Arm) -> list[str]:
    """A row of the table: the answer rate at the first, last and best step, and the format rate at the last."""
    answers, formats = curve(arm, "main", "answer"), curve(arm, "main", "format")
    assert answers is not None
    assert formats is not None
    best = max(range(len(answers.steps)), key=lambda i: answers.mean[i])

    def cell(values: tuple[float, float, float]) -> str:
        if answers.seeds == 1:
            n = next(row["n"] for row in arm.runs[0].evaluations if row["name"] == arm.runs[0].name)
            return interval(Estimate(values[0], *wilson_interval(round(values[0] * n), n)))
        return interval(Estimate(*values))

    at = list(zip(answers.mean, answers.low, answers.high, strict=True))
    return [
        arm.label,
        str(len(arm.runs)),
        ", ".join(dict.fromkeys(run.progress for run in arm.runs)),
        cell(at[0]),
        cell(at[-1]),
        f"{cell(at[best])} at {answers.steps[best]:g}",
        cell((formats.mean[-1], formats.low[-1], formats.high[-1])),
    ]


def write_csv(path: Path, arms: Sequence[Arm]) -> None:
    """Write every number of every panel: one line for each run, quantity and step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "run", "seed", "of", "quantity", "outer_step", "value"])
        for arm in arms:
            for run in arm.runs:
                for panel in PANELS:
                    of = run.name if panel.of == "main" else panel.of
                    for key in panel.keys:
                        for step, value in points(run, panel.of, key).items():
                            seed = run.arguments.get("seed", "")
                            writer.writerow([arm.label, run.folder, seed, of, key, f"{step:g}", repr(value)])
