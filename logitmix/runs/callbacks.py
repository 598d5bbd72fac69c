"""What each training command adds to TRL's trainers: progress, the run's files, evaluations, a graceful stop."""

import shlex
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitmix.runs.files import COMPLETIONS_FILE, METRICS_FILE
from logitmix.runs.folder import append_jsonl, console, progress_bar, record_start, rewind, validate_same_data
from logitmix.runs.provenance import fingerprint
from logitmix.training.checkpointing.folders import explained_write_errors
from logitmix.training.grpo import LogitMixGRPOTrainer


class ProgressBar(TrainerCallback):
    """A progress bar with the time left and the main metrics, instead of the dictionaries that the Trainer prints."""

    SHOWN = ("reward", "format_rate", "loss")  # the first two of these that the trainer logs

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
    """Writes each log of the trainer as a line of `metrics.jsonl`, whatever trackers `report_to` names."""

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


class CompletionsFile(TrainerCallback):
    """Writes the first `count` completions of each outer step to `completions.jsonl`, with their rewards.

    `step` is the update they were sampled for; `advantage` is that of eq. 4.
    """

    def __init__(self, trainer: LogitMixGRPOTrainer, count: int) -> None:
        self.trainer, self.count = trainer, count
        self._tokens_seen = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens_seen = state.num_input_tokens_seen

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state, state.global_step)

    def _write(self, args: TrainingArguments, state: TrainerState, step: int) -> None:
        if state.num_input_tokens_seen == self._tokens_seen:  # TRL adds to it when it samples
            return
        self._tokens_seen = state.num_input_tokens_seen
        logs = self.trainer.completion_log
        columns = {"prompt": logs["prompt"], "completion": logs["completion"]} | logs["rewards"]
        columns |= {"advantage": logs["advantages"]}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if state.is_world_process_zero:
            lines = [{"step": step} | row for row in rows[: self.count]]
            append_jsonl(Path(args.output_dir or ".") / COMPLETIONS_FILE, lines)


class StopOnSignal(TrainerCallback):
    """Finishes the step and saves a checkpoint on Ctrl-C or a cluster's SIGTERM; a second signal stops at once.

    A signal to one of several processes stops all of them at the same step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = {number: signal.signal(number, self._stop) for number in self.SIGNALS}

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = True
        self.restore()
        console.print(
            f"{signal.Signals(signum).name}: finishing this step, then saving. Send it again to stop without saving."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped = any(gather_object([self.stopped]))
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the signal handlers from before the training."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class EverySteps(TrainerCallback):
    """Calls a function of the step before the first step, every `every` steps, and after the last."""

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


def train_with_progress(
    trainer: Trainer, title: str, callbacks: Sequence[TrainerCallback] = (), checkpoint: str | None = None
) -> None:
    """Train with a progress bar and `metrics.jsonl` instead of the dictionaries that the Trainer prints."""
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
    command: Sequence[str],
    title: str,
    arguments: Mapping[str, Any],
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback] = (),
    data: Mapping[str, Iterable[Any]] | None = None,
) -> None:
    """Record the start of the run, train, and save the model.

    On Ctrl-C or SIGTERM, save a checkpoint, print how to continue `command`, and raise `KeyboardInterrupt`. `data`
    holds the rows trained and evaluated on, by name; their fingerprints are recorded.
    """
    output_dir = trainer.args.output_dir
    fingerprints = {name: fingerprint(rows) for name, rows in (data or {}).items()}
    if checkpoint is not None:
        validate_same_data(output_dir, fingerprints)
    trainer.accelerator.wait_for_everyone()  # another process may still check that the folder is free
    if trainer.is_world_process_zero():
        resolved = {key: value for key, value in trainer.args.to_dict().items() if arguments.get(key) != value}
        passed_over = rewind(output_dir, checkpoint)
        record_start(
            output_dir,
            arguments,
            resumed_from=checkpoint,
            passed_over=passed_over,
            resolved=resolved,
            data=fingerprints,
        )
    stop = StopOnSignal()
    try:
        train_with_progress(trainer, title, (stop, *callbacks), checkpoint)
    finally:
        stop.restore()
    if stop.stopped:
        again = shlex.join([*_without_resume(command), "--resume_from_checkpoint", "true"])
        console.print(f"Saved step {trainer.state.global_step}. Continue with:\n  {again}", soft_wrap=True)
        raise KeyboardInterrupt
    with explained_write_errors(Path(output_dir), "the model"):
        trainer.save_model()
    PartialState().destroy_process_group()  # a launcher may take a process that exits with it for a crash


def _without_resume(command: Sequence[str]) -> list[str]:
    kept = list(command)
    if "--resume_from_checkpoint" in kept:
        i = kept.index("--resume_from_checkpoint")
        del kept[i : i + 2]
    return kept
