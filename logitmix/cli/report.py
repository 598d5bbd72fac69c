"""`logitmix report RUN [RUN ...]`: curves of training runs, as figures, an HTML page and a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.parser import parse
from logitmix.cli.options.validation import validate_distinct


@dataclass
class ReportArguments:
    """Report"""

    runs: list[str] = field(
        metadata={
            "help": "Folders of training runs, or of several; NAME=FOLDER names an arm. Runs of one name, or runs "
            "that differ only in the seed, are one arm."
        }
    )
    output_dir: str = field(
        default="report", metadata={"help": "Folder for the report alone; an existing report is overwritten."}
    )
    title: str = field(default="Training runs", metadata={"help": "Title of the page."})


def main(argv: Sequence[str]) -> None:
    description = "Plot the curves of training runs and summarise them in a table."
    run(parse("report", description, ReportArguments, argv, positional=("runs", "RUN [RUN ...]")))


def run(args: ReportArguments) -> None:
    from logitmix.evaluation.report.curves import read_runs
    from logitmix.evaluation.report.training_report import select_drawn, write_training_report
    from logitmix.runs.console import console
    from logitmix.runs.folder import find_run_or_model

    folder = Path(args.output_dir)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; --output_dir must be a folder")
    found = find_run_or_model(folder)
    if found is not None:
        raise ValueError(
            f"{folder} holds a run or a model ({found}); give the report its own folder: {folder / 'report'}"
        )
    validate_distinct(args.runs, "run")
    arms, notes = select_drawn([run for source in args.runs for run in read_runs(source)])
    num_figures = write_training_report(folder, args.title, arms, notes)
    page = folder / "report.html"
    console.print(f"{page}, report.csv and {num_figures} figures (PNG and SVG) are in {folder}.", soft_wrap=True)
