"""What training/transformers_patches.py assumes of transformers, accelerate and torch."""

import inspect
from importlib.metadata import version

import pytest
import torch.distributed.fsdp
from transformers import Trainer
from transformers.generation import GenerationMixin

from logitmix.training import transformers_patches
from logitmix.training.checkpointing.folders import STATE_FILE
from logitmix.training.transformers_patches import PatchedTrainer
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has
from tests.helpers.grpo import trainer_of

PARAMETERS = {
    "train": ("self", "resume_from_checkpoint"),
    "save_model": ("self", "output_dir", "_internal_call"),
    "_save": ("self", "output_dir", "state_dict"),
    "_prepare_for_training": ("self",),
    "_get_output_dir": ("self", "trial"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_save_rng_state": ("self", "output_dir"),
    "_issue_warnings_after_load": ("self", "load_result"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_init_training_state": ("self", "max_steps"),
    "_run_epoch": ("self",),
    "_finalize_training": ("self", "trial", "num_train_samples", "start_time"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_trainer_has_the_methods_that_we_replace(name):
    assert_has("transformers", Trainer, name)
    assert_parameters("transformers", getattr(Trainer, name), *PARAMETERS[name])


def test_the_trainer_calls_the_methods_that_we_replace():
    source = inspect.getsource(Trainer)
    for name in PARAMETERS:
        if name not in ("train", "save_model"):
            assert f"self.{name}(" in source, f"transformers {version('transformers')}: nothing calls {name}"


def test_the_trainer_writes_a_checkpoint_under_the_output_dir_it_asks_for():
    save = Trainer._save_checkpoint
    assert_source_has("transformers", save, "self._get_output_dir(trial=trial)", "self._save_rng_state(output_dir)")


def test_an_epoch_gets_the_keywords_that_we_read():
    keywords = set(inspect.signature(Trainer._run_epoch).parameters)
    needed = {"model", "epoch", "train_dataloader", "start_time"}
    assert needed <= keywords, f"transformers {version('transformers')}: _run_epoch takes {keywords}"


def test_the_trainer_keeps_the_running_totals_that_a_checkpoint_would_lose(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert_has("transformers", trainer, *PatchedTrainer.RUNNING_TOTALS)


def test_the_trainers_state_is_saved_under_the_name_that_we_read():
    assert STATE_FILE == "trainer_state.json"
    assert_source_has("transformers", Trainer._save_checkpoint, "TRAINER_STATE_NAME")


def test_torch_marks_the_models_that_fsdp_manages():
    """`generate` reads the mark, through transformers' `is_fsdp_managed_module`."""
    assert_source_has("torch", torch.distributed.fsdp.fully_shard, "_is_fsdp_managed_module = True")
    assert "is_fsdp_managed_module(self)" in inspect.getsource(GenerationMixin), (
        f"transformers {version('transformers')}: generate no longer asks whether FSDP manages the model"
    )


def test_the_versions_that_the_patches_were_written_against_are_installed():
    short = ".".join(version("transformers").split(".")[:2])
    assert f"transformers {short}" in transformers_patches.__doc__
