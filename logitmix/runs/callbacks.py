"""What every training command adds to TRL's trainers: progress, files of the run, evaluations, a graceful stop."""

import shlex
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from logitmix.runs.files import COMPLETIONS_FILE, METRICS_FILE
from logitmix.runs.folder import append_jsonl, console, progress_bar, record_start, require_same_data, rewind
from logitmix.runs.provenance import fingerprint
from logitmix.training.checkpointing.folders import explained_write_errors
from logitmix.training.fsdp import whole_state_dict


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


class CompletionsFile(TrainerCallback):
    """The first `count` completions of every generation as lines of `completions.jsonl`, with their rewards.

    `step` is the optimizer step that they were sampled for; `advantage` is eq. 4's.
    """

    def __init__(self, trainer: GRPOTrainer, count: int) -> None:
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
        if state.num_input_tokens_seen == self._tokens_seen:  # the trainer adds to it at every generation
            return
        self._tokens_seen = state.num_input_tokens_seen
        logs = self.trainer._logs
        columns = {"prompt": logs["prompt"], "completion": logs["completion"]} | logs["rewards"]
        columns |= {"advantage": logs["advantages"]}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if state.is_world_process_zero:
            lines = [{"step": step} | row for row in rows[: self.count]]
            append_jsonl(Path(args.output_dir or ".") / COMPLETIONS_FILE, lines)


class StopOnSignal(TrainerCallback):
    """The first Ctrl-C, or the SIGTERM of a cluster, finishes the step under way and saves a checkpoint; the second
    stops at once. Where one of several processes is told, all stop at the same step.
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
            f"{signal.Signals(signum).name}: finishing this step, then saving. Another one stops at once, unsaved."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped = any(gather_object([self.stopped]))
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back to what handled them before the training."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


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
    data: Mapping[str, Iterable[Any]] | None = None,
) -> None:
    """Record the start, train and save the model; on Ctrl-C or SIGTERM save a checkpoint, say how to go on, and raise
    `KeyboardInterrupt`. `arguments["command"]` is the verb that `argv` belongs to; `data` are the rows trained and
    evaluated on, by name.
    """
    output_dir = trainer.args.output_dir
    fingerprints = {name: fingerprint(rows) for name, rows in (data or {}).items()}
    if checkpoint is not None:
        require_same_data(output_dir, fingerprints)
    trainer.accelerator.wait_for_everyone()  # no process may still be looking whether the folder is free
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
        train_watched(trainer, title, (stop, *callbacks), checkpoint)
    finally:
        stop.restore()
    if stop.stopped:
        command = ["logitmix", arguments["command"], *_without_resume(argv), "--resume_from_checkpoint", "true"]
        console.print(
            f"Saved step {trainer.state.global_step}. Continue with:\n  {shlex.join(command)}", soft_wrap=True
        )
        raise KeyboardInterrupt
    with explained_write_errors(Path(output_dir), "the model"), whole_state_dict(trainer.accelerator):
        trainer.save_model()
    PartialState().destroy_process_group()  # or a process that is done first may be taken for one that died


def _without_resume(argv: Sequence[str]) -> list[str]:
    kept = list(argv)
    if "--resume_from_checkpoint" in kept:
        i = kept.index("--resume_from_checkpoint")
        del kept[i : i + 2]
    return kept
