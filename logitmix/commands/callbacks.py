"""What every training command adds to TRL's trainers: progress, metrics, evaluations, a graceful Ctrl-C."""

import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitmix.commands.runs import METRICS_FILE, append_jsonl, console, progress_bar, record_start
from logitmix.training.sharding import whole_state_dict


class ProgressBar(TrainerCallback):
    """A progress bar with time left and the numbers that matter, in place of the Trainer's printed dictionaries."""

    SHOWN = ("reward", "format_rate", "loss")  # the first two of those that a trainer logs

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
        values = [
            f"{key.removesuffix('_rate')} {logs[key]:.2f}"
            for key in self.SHOWN
            if logs and isinstance(logs.get(key), float)
        ]
        if state.is_world_process_zero and values:
            self.bar.update(self.row, info=" ".join(values[:2]))

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


def train_watched(
    trainer: Trainer, title: str, callbacks: Sequence[TrainerCallback] = (), checkpoint: str | None = None
) -> None:
    """Train with a progress bar and `metrics.jsonl`, in place of the dictionaries that the Trainer prints."""
    progress = ProgressBar(title)
    trainer.remove_callback(PrinterCallback)
    for callback in (progress, MetricsFile(), *callbacks):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if progress.bar.live.is_started:  # an exception would leave the terminal without a cursor
            progress.bar.stop()


def run_training(
    trainer: Trainer,
    argv: Sequence[str],
    title: str,
    arguments: Mapping[str, Any],
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Record the start, train and save the model; on Ctrl-C save a checkpoint, say how to go on, and raise
    `KeyboardInterrupt`. `arguments["command"]` is the verb that `argv` belongs to.
    """
    trainer.accelerator.wait_for_everyone()  # no process may still be looking whether the folder is free
    if trainer.is_world_process_zero():
        record_start(trainer.args.output_dir, arguments, checkpoint)
    stop = StopOnInterrupt()
    train_watched(trainer, title, (stop, *callbacks), checkpoint)
    if stop.interrupted:
        command = ["logitmix", arguments["command"], *_without_resume(argv), "--resume_from_checkpoint", "true"]
        console.print(
            f"Saved step {trainer.state.global_step}. Continue with:\n  {shlex.join(command)}", soft_wrap=True
        )
        raise KeyboardInterrupt
    with whole_state_dict(trainer.accelerator):
        trainer.save_model()
    PartialState().destroy_process_group()  # or a process that is done first may be taken for one that died


def _without_resume(argv: Sequence[str]) -> list[str]:
    kept = list(argv)
    if "--resume_from_checkpoint" in kept:
        i = kept.index("--resume_from_checkpoint")
        del kept[i : i + 2]
    return kept
