"""A run's folder, and the callbacks that every training command has: progress, metrics, a graceful Ctrl-C."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
RESPONSES_FILE = "responses.jsonl"

# The logs to standard error: a command's standard output is its result.
console = Console(stderr=True)


def claim_folder(output_dir: str, arguments: Mapping[str, Any], resume: str | None = None) -> str | None:
    """Make a run's folder, write what made the run into it, and return the checkpoint to resume from, if any.

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
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("logitmix", "torch", "transformers", "trl", "accelerate", "datasets")
    description = {"versions": {name: version(name) for name in packages}, "arguments": arguments}
    (folder / RUN_FILE).write_text(json.dumps(description, indent=1, default=str) + "\n")
    return checkpoint


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return [json.loads(line) for line in path.read_text().splitlines()]


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )


class ProgressBar(TrainerCallback):
    """A progress bar with time left and the numbers that matter, in place of the Trainer's printed dictionaries."""

    SHOWN = ("loss", "reward", "format_rate")

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = progress_bar()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.start()
            self.row = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, info="")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.row, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = [f"{key} {logs[key]:.3f}" for key in self.SHOWN if logs and isinstance(logs.get(key), float)]
        if state.is_world_process_zero and values:
            self.bar.update(self.row, info=", ".join(values))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar.stop()


class MetricsFile(TrainerCallback):
    """Every log of the trainer as a line of `metrics.jsonl`, whatever tracker `report_to` names."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            append_jsonl(Path(args.output_dir or ".") / METRICS_FILE, [{"step": state.global_step} | logs])


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step under way and saves a checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = signal.default_int_handler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)
        console.print("Interrupted: finishing this step, then saving. Ctrl-C again stops at once, without saving.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)


class EverySteps(TrainerCallback):
    """Call a function of the step before the first step, every `every` steps and after the last."""

    def __init__(self, every: int, function: Callable[[int], None]) -> None:
        self.every, self.function = every, function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.function(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.function(state.global_step)


def run_training(trainer: Trainer, title: str, checkpoint: str | None, verb: str, argv: Sequence[str]) -> None:
    """Train, save the model beside the checkpoints; on Ctrl-C save a checkpoint, say how to go on, and exit 130."""
    stop = StopOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    for callback in (ProgressBar(title), MetricsFile(), stop):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.interrupted:
        command = ["logitmix", verb, *_without_resume(argv), "--resume_from_checkpoint", "true"]
        console.print(
            f"Saved step {trainer.state.global_step}. Continue with:\n  {shlex.join(command)}", soft_wrap=True
        )
        sys.exit(130)
    trainer.save_model()


def _without_resume(argv: Sequence[str]) -> list[str]:
    kept = list(argv)
    if "--resume_from_checkpoint" in kept:
        i = kept.index("--resume_from_checkpoint")
        del kept[i : i + 2]
    return kept
