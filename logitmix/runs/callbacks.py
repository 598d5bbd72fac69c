"""Callbacks of every training command: a progress bar, the run's files, evaluations, and a stop that saves."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitmix.runs.console import console, progress_bar
from logitmix.runs.files import COMPLETIONS_FILE, METRICS_FILE, append_jsonl
from logitmix.training.grpo import LogitMixGRPOTrainer


class ProgressBar(TrainerCallback):
    """A progress bar with the time left and the latest metrics, instead of the Trainer's printed dictionaries."""

    SHOWN = ("reward", "format_rate", "loss")  # the first two that the trainer logs

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
    """Writes every log of the trainer as a line of `metrics.jsonl`, independent of the trackers in `report_to`."""

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
    """Writes the first `count` completions of every outer step as lines of `completions.jsonl`, with their rewards.

    `step` is the update that they were sampled for, `advantage` that of eq. 4.
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
        if state.num_input_tokens_seen == self._tokens_seen:  # the trainer adds to it when it samples
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
    """Stops the training on Ctrl-C or a cluster's SIGTERM, after the current step, and saves a checkpoint.

    A second signal stops immediately. If one of several processes receives the signal, all stop at the same step.
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
            f"{signal.Signals(signum).name}: finishing this step, then saving a checkpoint. "
            "Repeat it to stop immediately without saving."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped = any(gather_object([self.stopped]))
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Reinstall the signal handlers from before the training."""
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
