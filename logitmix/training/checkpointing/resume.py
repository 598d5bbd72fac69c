"""Exact resume: a run killed at any moment continues as if it had never stopped.

transformers saves weights, optimizer, scheduler, random generators and the step. TRL's trainers hold more that later
steps depend on, and lose it on resume:

- rollouts that serve several updates (`steps_per_generation`, `num_iterations`): TRL samples them again;
- the count of micro-batches, which says when to sample: TRL starts it at 0, which shifts the cycle;
- the order of questions from the second epoch on: TRL repeats the first epoch's order;
- loss and metrics since the last log, the token count, and the mean loss of the run.

On a CPU in float32 a resumed run matches an uninterrupted one bit for bit, in weights and logs; only times differ.
Each process saves its own progress file, so a run must resume on as many processes.
"""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from logitmix.mixture.quantization import num_bytes
from logitmix.training.checkpointing.folders import (
    STAGING,
    STATE_FILE,
    explained_write_errors,
    last_whole_checkpoint,
    publish,
    validate_has_optimizer,
)
from logitmix.training.checkpointing.frozen import FrozenWeights

logger = logging.get_logger(__name__)


class State(NamedTuple):
    """A part of the run that a checkpoint holds: how to read it for saving, and how to set it on resume."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class Checkpointing:
    """Writes complete checkpoints of a trainer's run, and restores from them all that later steps depend on.

    `trainer` is a patched one (trl_patches.py), which calls these methods where it saves and resumes.
    `states` are parts of the run beyond what the trainer itself keeps, by their keys in the progress file. Each holds
    plain containers and tensors, as `torch.load(weights_only=True)` reads them.
    """

    def __init__(self, trainer: Trainer, states: Mapping[str, State] | None = None) -> None:
        self.trainer = trainer
        self.states = dict(states or {})
        self.frozen = FrozenWeights(trainer)
        self.staging_folder: str | None = None  # while a checkpoint is being written
        self.resumes_from: str | bool | None = None  # until its progress is restored
        self.seconds_before = 0.0  # of training, in earlier processes
        self._start_time = 0.0

    @property
    def name(self) -> str:
        """The name of the checkpoint of the current step."""
        return f"{PREFIX_CHECKPOINT_DIR}-{self.trainer.state.global_step}"

    def begin(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from: for `True`, the last complete one of `output_dir`.

        Raises `ValueError` for a checkpoint without optimizer or schedule, unless `resume_without_optimizer` is set.
        """
        args = self.trainer.args
        if resume_from_checkpoint is True:
            # without one, `Trainer` raises the error
            resume_from_checkpoint = str(last_whole_checkpoint(Path(args.output_dir)) or "") or True
        is_folder = isinstance(resume_from_checkpoint, str) and os.path.isdir(resume_from_checkpoint)
        if is_folder and not getattr(args, "resume_without_optimizer", False):
            validate_has_optimizer(Path(str(resume_from_checkpoint)))
        self.resumes_from = resume_from_checkpoint or None
        if args.should_save:
            shutil.rmtree(Path(args.output_dir) / STAGING, ignore_errors=True)  # left by a killed process
        return resume_from_checkpoint

    # --- saving -------------------------------------------------------------------------------------------------

    @contextmanager
    def staged(self, run_folder: Path) -> Iterator[None]:
        """Within the context a checkpoint is written to the staging folder; at its end it takes its own name."""
        trainer = self.trainer
        staging = run_folder / STAGING
        with explained_write_errors(run_folder, self.name, self._bytes_to_save):
            self.staging_folder = str(staging)
            try:
                yield
            finally:
                self.staging_folder = None
            self._rename_best_checkpoint(staging / self.name, run_folder / self.name)
            trainer.accelerator.wait_for_everyone()  # each process writes a part
            if trainer.args.should_save:
                publish(staging / self.name, run_folder / self.name)
        trainer.accelerator.wait_for_everyone()

    def rotate(self, run_folder: Path) -> None:
        """Delete checkpoints beyond `save_total_limit`."""
        args = self.trainer.args
        if args.should_save:
            best = self.trainer.state.best_model_checkpoint
            rotate_checkpoints(str(run_folder), args.save_total_limit, best, True)

    def _rename_best_checkpoint(self, staged: Path, checkpoint: Path) -> None:
        """Correct the state where it names the best checkpoint by its staging folder."""
        state = self.trainer.state
        if state.best_model_checkpoint == str(staged):
            state.best_model_checkpoint = str(checkpoint)
            if self.trainer.args.should_save:
                state.save_to_json(str(staged / STATE_FILE))

    def _bytes_to_save(self) -> int:
        tensors = self.frozen.weights_to_save()
        for state in self.trainer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(map(num_bytes, tensors))

    def save_progress(self, checkpoint: str) -> None:
        """Write this process's progress: what later steps and logs depend on beyond what transformers saves."""
        progress = {
            "kept": self.trainer.running_totals,
            "metrics": dict(self.trainer.step_metrics),
            "seconds": self.seconds_before + time.time() - self._start_time,
        }
        progress |= {key: state.read() for key, state in self.states.items()}
        torch.save(progress, self._progress_file(checkpoint))

    def _progress_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"progress_{self.trainer.args.process_index}.pt")

    # --- resuming -----------------------------------------------------------------------------------------------

    def start_epoch(self, start_time: float) -> None:
        """Restore the progress, in the first epoch of a resumed run. `start_time` is that of `Trainer.train`."""
        self._start_time = start_time
        self.restore_progress()

    def restore_progress(self) -> None:
        """Restore this process's progress once, after transformers has restored its own part of the checkpoint."""
        checkpoint, self.resumes_from = self.resumes_from, None
        if checkpoint is None:
            return
        path = self._progress_file(str(checkpoint))
        if not os.path.exists(path):
            logger.warning(f"{path} does not exist, so the run resumes from {checkpoint}, but not exactly.")
            return
        # by type: each of several processes on a CPU has a device "cpu:0", which torch.load does not know
        progress = torch.load(path, map_location=self.trainer.args.device.type, weights_only=True)
        self.trainer.running_totals = progress["kept"]
        self.trainer.step_metrics = defaultdict(list, progress["metrics"])
        self.seconds_before = progress["seconds"]
        for key, state in self.states.items():
            if progress.get(key) is not None:
                state.write(progress[key])

    def validate_loaded(self, load_result: Any) -> None:
        """Raise `ValueError` where a trained weight is missing from the loaded checkpoint.

        Weights that share memory with loaded ones (tied heads), and frozen ones that the checkpoint refers to, are
        taken off `load_result.missing_keys`.
        """
        load_result.missing_keys[:] = self.frozen.drop_loaded(load_result.missing_keys)
        weights = dict(self.trainer.model.named_parameters(remove_duplicate=False))
        missing = [name for name in load_result.missing_keys if name in weights]
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        missing = [name for name in missing if weights[name].data_ptr() not in loaded]
        trained = [name for name in missing if weights[name].requires_grad]
        if trained:
            raise ValueError(
                f"the checkpoint has no weights for {len(trained)} trained parameters, the first of them "
                f"{trained[0]!r}; resume from a checkpoint of this model"
            )
        load_result.missing_keys[:] = missing


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the seed and the epoch alone, not on the epochs it ran through."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def by_epoch(sampler: Any) -> Any:
    """`sampler`, or an `EpochRepeatSampler` in place of TRL's `RepeatSampler`."""
    if type(sampler) is not RepeatSampler:
        return sampler
    return EpochRepeatSampler(
        sampler.data_source,
        mini_repeat_count=sampler.mini_repeat_count,
        batch_size=sampler.batch_size,
        repeat_count=sampler.repeat_count,
        shuffle=sampler.shuffle,
        seed=sampler.seed,
    )
