"""A run's folder, its files, and what is shown while it runs."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

RUN_FILE = "run.jsonl"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
RESPONSES_FILE = "responses.jsonl"

# A folder that holds one of these is somebody's: a run, or a model
HELD = (RUN_FILE, "checkpoint-*", "config.json", "*.safetensors", "*.bin")
# What may differ between a run and its resumption: how far it goes, and what is written on the way
MAY_CHANGE = {
    *("max_steps", "num_train_epochs", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name"),
    *("logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_completions"),
    *("save_steps", "save_strategy", "save_total_limit", "eval_every", "eval_limit", "dataloader_num_workers"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
}

# The logs to standard error: a command's standard output is its result.
console = Console(stderr=True)


def find_checkpoint(output_dir: str, arguments: Mapping[str, Any], resume: str | None) -> str | None:
    """The checkpoint that a run resumes from, None for a new run; called before anything is loaded or written.

    `resume` is TRL's `--resume_from_checkpoint`: a checkpoint's folder, or `true` for the run's last one.

    Raises `ValueError` for a folder that holds something already, for a checkpoint that does not exist or is of
    another run, for arguments that would make another run of it, and where there are no steps left to take.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output_dir} is a file; --output_dir must be a folder")
    last = get_last_checkpoint(output_dir) if folder.is_dir() else None
    if resume is None or resume.lower() == "false":
        held = next((name for name in HELD if list(folder.glob(name))), None)
        if held is not None:
            way_out = "continue that run with --resume_from_checkpoint true" if last else "remove it"
            raise ValueError(f"{output_dir} holds another run ({held}); choose another --output_dir, or {way_out}")
        return None
    checkpoint = last if resume.lower() == "true" else resume
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise ValueError(f"there is no checkpoint to resume from in {(checkpoint or output_dir)!r}")
    if Path(checkpoint).resolve().parent != folder.resolve():
        raise ValueError(f"the checkpoint {checkpoint} is not of the run in {output_dir}; make that the --output_dir")
    if (folder / RUN_FILE).exists():
        before = read_jsonl(folder / RUN_FILE)[-1]["arguments"]
        now = json.loads(json.dumps(arguments, default=str))
        changed = [key for key in before if key not in MAY_CHANGE and before[key] != now.get(key)]
        if changed:
            differences = ", ".join(f"{key} {before[key]!r}, now {now.get(key)!r}" for key in changed)
            raise ValueError(f"the run in {output_dir} was started with {differences}; resume it with the same")
    step, max_steps = checkpoint_step(checkpoint), arguments["max_steps"]
    if 0 < max_steps <= step:
        raise ValueError(f"{checkpoint} is at step {step} and max_steps is {max_steps}; raise --max_steps to go on")
    return checkpoint


def record_start(output_dir: str, arguments: Mapping[str, Any], checkpoint: str | None = None) -> None:
    """Add a line to the run's `run.jsonl`: arguments and versions, and the checkpoint where it resumes.

    What the files hold of steps after that checkpoint is dropped: those steps are taken again.
    """
    folder = Path(output_dir)
    packages = ("logitmix", "torch", "transformers", "trl", "accelerate", "datasets")
    versions = {name: version(name) for name in packages}
    append_jsonl(folder / RUN_FILE, [{"resumed_from": checkpoint, "arguments": arguments, "versions": versions}])
    for path in (folder / METRICS_FILE, folder / EVALUATIONS_FILE):
        if checkpoint is not None and path.exists():
            rows = [row for row in read_jsonl(path) if row["step"] <= checkpoint_step(checkpoint)]
            path.write_text("")
            append_jsonl(path, rows)


def checkpoint_step(checkpoint: str) -> int:
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return int(state["global_step"])


def quiet_libraries() -> None:
    """Hide the bars of transformers and datasets; our own show what takes time."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


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
