"""A run's folder, its files, and what is shown while it runs."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_utils import get_last_checkpoint

RUN_FILE = "run.jsonl"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
RESPONSES_FILE = "responses.jsonl"

# The logs to standard error: a command's standard output is its result.
console = Console(stderr=True)


def claim_folder(output_dir: str, arguments: Mapping[str, Any], resume: str | None = None) -> str | None:
    """Make a run's folder, note what makes the run in it, and return the checkpoint to resume from, if any.

    `run.jsonl` gets a line at the start and at every resumption: the arguments and the versions.

    `resume` is TRL's `--resume_from_checkpoint`: a checkpoint's folder, or `true` for the run's last one.

    Raises `ValueError` for a folder that holds another run, and for a checkpoint that does not exist.
    """
    folder = Path(output_dir)
    holds_run = (folder / RUN_FILE).exists() or bool(list(folder.glob("checkpoint-*")))
    checkpoint = None
    if resume is not None and resume.lower() != "false":
        checkpoint = get_last_checkpoint(output_dir) if folder.is_dir() and resume.lower() == "true" else resume
        if checkpoint is None or not Path(checkpoint).is_dir():
            raise ValueError(f"there is no checkpoint to resume from in {resume if checkpoint else output_dir!r}")
    elif holds_run:
        raise ValueError(
            f"{output_dir} holds another run; choose another --output_dir, or continue that run with "
            "--resume_from_checkpoint true"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output_dir} is a file; --output_dir must be a folder")
    packages = ("logitmix", "torch", "transformers", "trl", "accelerate", "datasets")
    versions = {name: version(name) for name in packages}
    append_jsonl(folder / RUN_FILE, [{"resumed_from": checkpoint, "arguments": arguments, "versions": versions}])
    return checkpoint


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return [json.loads(line) for line in path.read_text().splitlines()]


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )
