"""Running a trainer: with a progress bar and metrics, recorded in the run's folder, and stopped without loss."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback

from logitmix.runs.callbacks import MetricsFile, ProgressBar, StopOnSignal
from logitmix.runs.console import console
from logitmix.runs.folder import record_start, rewind, validate_same_data
from logitmix.runs.provenance import fingerprint
from logitmix.training.checkpointing.folders import explained_write_errors
from logitmix.training.fsdp import whole_state_dict

RESUME = "--resume_from_checkpoint"


def run_training(
    trainer: Trainer,
    command: Sequence[str],
    title: str,
    arguments: Mapping[str, Any],
    checkpoint: str | None,
    callbacks: Sequence[TrainerCallback] = (),
    data: Mapping[str, Iterable[Any]] | None = None,
) -> None:
    """Record the start in `run.jsonl`, train, and save the model.

    Args:
        command: the command line of the run, printed with `--resume_from_checkpoint true` when the run is stopped.
        arguments: what `run.jsonl` records of the configuration.
        checkpoint: the checkpoint to resume from, from `find_checkpoint`.
        data: the rows trained and evaluated on, by name; `run.jsonl` records their fingerprints.

    On Ctrl-C or SIGTERM it saves a checkpoint, prints how to continue, and raises `KeyboardInterrupt`.
    """
    output_dir = trainer.args.output_dir
    fingerprints = {name: fingerprint(rows) for name, rows in (data or {}).items()}
    if checkpoint is not None:
        validate_same_data(output_dir, fingerprints)
    trainer.accelerator.wait_for_everyone()  # until every process has checked that the folder is free
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
        resume = shlex.join([*_without_resume(command), RESUME, "true"])
        console.print(f"Saved step {trainer.state.global_step}. Continue with:\n  {resume}", soft_wrap=True)
        raise KeyboardInterrupt
    with explained_write_errors(Path(output_dir), "the model"), whole_state_dict(trainer.accelerator):
        trainer.save_model()
    # otherwise a process that finishes first may be taken for one that died
    PartialState().destroy_process_group()


def train_with_progress(
    trainer: Trainer, title: str, callbacks: Sequence[TrainerCallback] = (), checkpoint: str | None = None
) -> None:
    """Train with a progress bar and `metrics.jsonl`, instead of the dictionaries that the Trainer prints."""
    progress = ProgressBar(title)
    trainer.remove_callback(PrinterCallback)
    for callback in (progress, MetricsFile(), *callbacks):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if progress.bar.live.is_started:  # an exception would leave the terminal without a cursor
            progress.bar.stop()


def _without_resume(command: Sequence[str]) -> list[str]:
    kept = list(command)
    if RESUME in kept:
        i = kept.index(RESUME)
        del kept[i : i + 2]
    return kept
