"""Training that a kill at any moment does not change: checkpoints whole or not there, and nothing left out of them.

transformers saves weights, optimizer, scheduler, random number generators and the step. TRL's trainers hold more that
the steps to come depend on, which a resumed run of theirs loses:

- rollouts that serve several updates (`steps_per_generation`, `num_iterations`): they are sampled again;
- the count of micro-batches that says when to sample: it starts at 0, so that the cycle shifts;
- the order of the questions from the second epoch on: the first epoch's comes again;
- loss and metrics since the last log, the tokens counted, the mean loss of the run.
"""

import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from logitmix.training.checkpointing.folders import STAGING, explained_write_errors, last_whole_checkpoint, publish

logger = logging.get_logger(__name__)


class Resumable(Trainer):
    """A mixin before one of TRL's trainers: `class MyTrainer(Resumable, SFTTrainer)`.

    A run resumed from one of its checkpoints goes on as the run that was never stopped: on a CPU in float32 bit for
    bit, with the same weights and logs; times and throughput differ. Each process saves its own part, so as many
    have to resume.
    """

    # What transformers and TRL hold between logs, and report at the end
    KEPT: tuple[str, ...] = (
        *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"),
        "_total_train_tokens",
    )
    _staging: str | None = None
    _resumes_from: str | None = None
    _start_time = 0.0
    _seconds_before = 0.0  # spent in training before this process

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As transformers' `train`; `True` resumes from the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            # without one, transformers has the error
            resume_from_checkpoint = str(last_whole_checkpoint(Path(self.args.output_dir)) or "") or True
        self._resumes_from = resume_from_checkpoint or None  # type: ignore[assignment]
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)  # of a process that was killed
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # --- saving -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint aside, let it take its name when it is whole, and only then delete older ones."""
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with explained_write_errors(run_folder, name, self._bytes_to_save):
            self._staging = str(run_folder / STAGING)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._name_best_checkpoint(run_folder, name)
            self.accelerator.wait_for_everyone()  # each process writes a part
            if self.args.should_save:
                publish(run_folder / STAGING / name, run_folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint, True)

    def _name_best_checkpoint(self, run_folder: Path, name: str) -> None:
        """The state names the best checkpoint by its folder, which is about to be renamed."""
        staged = run_folder / STAGING / name
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(run_folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not from a folder that is about to be renamed: the upload runs in the background."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _bytes_to_save(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self._progress(), self._progress_file(output_dir))

    def _progress_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"progress_{self.args.process_index}.pt")

    def _progress(self) -> dict[str, Any]:
        """What the steps and logs to come depend on, beyond what transformers saves; of this process."""
        return {
            "kept": {name: getattr(self, name) for name in self.KEPT},
            "metrics": dict(self._metrics["train"]),
            "seconds": self._seconds_before + time.time() - self._start_time,
        }

    # --- resuming -----------------------------------------------------------------------------------------------

    def _restore(self, progress: dict[str, Any]) -> None:
        for name, value in progress["kept"].items():
            setattr(self, name, value)
        self._metrics["train"] = defaultdict(list, progress["metrics"])
        self._seconds_before = progress["seconds"]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that share their memory with loaded ones (tied heads) are not missing; trainable ones must not be.

        Raises `ValueError` where a weight that is trained would start anew.
        """
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [name for name in load_result.missing_keys if name in weights]
        loaded = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        missing = [name for name in missing if weights[name].data_ptr() not in loaded]
        trained = [name for name in missing if weights[name].requires_grad]
        if trained:
            raise ValueError(
                f"the checkpoint has no weights for {len(trained)} parameters in training, the first {trained[0]!r}; "
                "it is not of this model"
            )
        load_result.missing_keys[:] = missing
        super()._issue_warnings_after_load(load_result)

    def _restore_progress(self) -> None:
        """Once, when transformers has set up the loop from its own part of the checkpoint."""
        checkpoint, self._resumes_from = self._resumes_from, None
        if checkpoint is None:
            return
        path = self._progress_file(checkpoint)
        if os.path.exists(path):
            # by type: of several processes on a CPU each has a device "cpu:0" that torch.load does not know
            self._restore(torch.load(path, map_location=self.args.device.type, weights_only=True))
        else:
            logger.warning(f"{path} does not exist, so the run goes on from {checkpoint}, but not exactly as before.")

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        # the state of a checkpoint has its own idea of when to log and save; what is asked for now holds
        self.state.compute_steps(self.args, max_steps)
        return result

    def _run_epoch(self, **kwargs: Any) -> None:
        self._start_time = kwargs["start_time"]
        self._restore_progress()
        if self.state.global_step >= self.state.max_steps:  # killed after the last step, or by the end of the run
            kwargs["model"].train()
            self.control.should_training_stop = True
            return
        _set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        """The last log, of the whole run: the mean loss and the time of all its parts."""
        if self._resumes_from is not None:  # no epoch was left to run
            self._restore_progress()
            self.model.train()
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class ResumableGRPO(Resumable):
    """The same for TRL's `GRPOTrainer`: rollouts in use, and the order of the questions."""

    KEPT = (*Resumable.KEPT, "_step")

    def _progress(self) -> dict[str, Any]:
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        progress = super()._progress() | {"rollouts": self._buffered_inputs if in_use else None}
        if self.log_completions:
            progress["completions"] = {
                name: {key: list(rows) for key, rows in column.items()} if isinstance(column, dict) else list(column)
                for name, column in self._logs.items()
                if name != "images"
            }
        return progress

    def _restore(self, progress: dict[str, Any]) -> None:
        super()._restore(progress)
        self._buffered_inputs = progress["rollouts"]
        for name, column in progress.get("completions", {}).items():
            if isinstance(column, dict):
                for key, rows in column.items():
                    self._logs[name][key].extend(rows)
            else:
                self._logs[name].extend(column)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
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


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch is the same whether or not it ran through the epochs before."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def _set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell the sampler which epoch it is.

    accelerate's `set_epoch` does not reach it through a loader that both skips batches and shares them among
    processes.
    """
    batch_sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    if hasattr(getattr(batch_sampler, "sampler", None), "set_epoch"):
        batch_sampler.sampler.set_epoch(epoch)
