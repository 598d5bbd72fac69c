"""What training replaces in transformers' `Trainer`, and the private names of transformers and torch it reads.

Written against transformers 5.19 and accelerate 1.15; tests/training/test_transformers_patches.py is the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from logitmix.training.fsdp import policy_head_exposed, whole_state_dict

if TYPE_CHECKING:
    from logitmix.training.checkpointing.resume import Checkpointing


class PatchedTrainer(Trainer):
    """`Trainer` that saves and resumes through its `checkpointing`, which makes resuming exact.

    A mixin before one of TRL's trainers: `class MyTrainer(PatchedTrainer, SFTTrainer)`.
    """

    checkpointing: Checkpointing

    # Sums since the last log, and what the log of a finished run reports
    RUNNING_TOTALS: tuple[str, ...] = (
        *("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"),
    )

    @property
    def running_totals(self) -> dict[str, Any]:
        """Loss sums and counters that `Trainer` keeps outside `TrainerState`, so a checkpoint would lose them."""
        return {name: getattr(self, name) for name in self.RUNNING_TOTALS}

    @running_totals.setter
    def running_totals(self, totals: dict[str, Any]) -> None:
        for name, value in totals.items():
            setattr(self, name, value)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in transformers; `True` resumes from the last complete checkpoint."""
        return super().train(resume_from_checkpoint=self.checkpointing.begin(resume_from_checkpoint), **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a sharded model whole: under SHARDED_STATE_DICT, `Trainer.save_model` writes nothing.

        Checkpoints keep the state-dict type of the FSDP plugin. The run's model takes the place of the frozen weights
        that its checkpoints refer to.
        """
        if self.checkpointing.staging_folder is not None:
            super().save_model(output_dir, _internal_call)
            return
        frozen, folder = self.checkpointing.frozen, Path(output_dir or str(self.args.output_dir))
        is_runs = self.args.should_save and folder.resolve() == frozen.run.resolve()
        if is_runs:
            frozen.before_model()
        with nullcontext() if _internal_call else whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)
        if is_runs:
            frozen.after_model()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Leave out the frozen weights where a reference to them is saved; `save_model` has no argument for it."""
        staging, frozen = self.checkpointing.staging_folder, self.checkpointing.frozen
        if not frozen.refers(is_checkpoint=staging is not None):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        super()._save(str(folder), frozen.trained())
        frozen.write_references(folder, folder if staging is None else frozen.run / folder.name)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Let accelerate see the policy's head, so that FSDP puts tied embeddings into one unit."""
        with policy_head_exposed(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        """Make `Trainer` write a checkpoint into the staging folder until it is complete."""
        return self.checkpointing.staging_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Publish a checkpoint by a rename when it is complete, and delete older ones only then."""
        run_folder = Path(self._get_output_dir(trial))
        with self.checkpointing.staged(run_folder):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / self.checkpointing.name))
        self.checkpointing.rotate(run_folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Wait for the rename: the upload reads the folder in the background."""
        if self.checkpointing.staging_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Add our progress file, which each process writes, like the states of its random generators."""
        super()._save_rng_state(output_dir)
        self.checkpointing.save_progress(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what the checkpoint refers to; and the adapter that trains, which `Trainer` skips beside others."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.checkpointing.frozen.load(Path(resume_from_checkpoint))
        model = self.model if model is None else model
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_peft_model(model) and not sharded and list(Path(resume_from_checkpoint).glob("*/adapter_config.json")):
            model.load_adapter(resume_from_checkpoint, model.active_adapter, is_trainable=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks trained weights, where `Trainer` would only warn."""
        self.checkpointing.validate_loaded(load_result)
        super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Log and save as often as the current arguments say, not as the checkpoint's state says."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return result

    def _run_epoch(self, **kwargs: Any) -> None:
        """Restore our progress when `Trainer` has restored its own, and stop at once if no step is left."""
        self.checkpointing.start_epoch(kwargs["start_time"])
        if self.state.global_step >= self.state.max_steps:  # the run was killed after its last step
            kwargs["model"].train()
            self.control.should_training_stop = True
            return
        set_sampler_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        """Report the mean loss and the time of the whole run, including the parts before a resume."""
        if self.checkpointing.resumes_from is not None:  # no epoch was left to run
            self.checkpointing.restore_progress()
            self.model.train()
        return super()._finalize_training(trial, num_train_samples, start_time - self.checkpointing.seconds_before)


def set_sampler_epoch(dataloader: Any, epoch: int) -> None:
    """Call `set_epoch` of the sampler inside accelerate's batch samplers.

    accelerate's own `set_epoch` does not reach it through a loader that both skips batches and shards them.
    """
    batch_sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(batch_sampler, "batch_sampler"):
        batch_sampler = batch_sampler.batch_sampler
    sampler: Any = getattr(batch_sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


@contextmanager
def generate_without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Hide from `generate`, within the context, that FSDP manages the model.

    `generate` keeps all processes in step if it finds torch's mark `_is_fsdp_managed_module`, and the `generate` that
    the Trainer puts on the instance gathers the root before each call and frees it afterwards. Gathered weights need
    neither.
    """
    marks = [name for name in ("_is_fsdp_managed_module", "generate") if name in vars(model)]
    hidden: dict[str, Any] = {name: vars(model).pop(name) for name in marks}
    try:
        yield
    finally:
        vars(model).update(hidden)
