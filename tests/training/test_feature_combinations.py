"""Combinations of adapters, alpha schedules, dynamic sampling, kept anchor states and checkpoints."""

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.adapters import anchor_of, lora, save_folders
from tests.helpers.grpo import PROMPTS
from tests.helpers.members import character_tokenizer


@pytest.fixture
def folders(tmp_path):
    return save_folders(tmp_path)


def has_a_vowel(completions, **kwargs):
    return [float(any(c in "aeiou" for c in completion)) for completion in completions]


ADAPTIVE = {"alpha_controller": "adaptive", "validation_size": 6, "adaptive_offset": 0.0, "adaptive_scale": 2.0}


def trainer_of(output_dir, folders, kind="two adapters", adapter=None, **options):
    """A trainer with six updates per batch of rollouts, each rollout used twice, and an adaptive alpha."""
    arguments = {
        "anchor": anchor_of(kind, folders), "alpha": 0.4,
        "per_device_train_batch_size": 4, "steps_per_generation": 3, "num_iterations": 2, "num_generations": 4,
        "max_completion_length": 9, "max_steps": 12, "learning_rate": 1e-2, "temperature": 0.8,
        "rollout_batch_size": 5, "dynamic_sampling": "filter", "gradient_checkpointing": True,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": [],
        "disable_tqdm": True,
    } | (ADAPTIVE if "alpha_controller" not in options else {}) | options  # fmt: skip
    return LogitMixGRPOTrainer(
        folders["base"],
        reward_funcs=has_a_vowel,
        args=LogitMixGRPOConfig(str(output_dir), **arguments),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        validation_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}) if "validation_size" in arguments else None,
        processing_class=character_tokenizer(),
        peft_config=None if kind == "full anchor" else lora(**(adapter or {})),
    )


def logs(trainer):
    """Everything logged except times."""
    keys = ("time/", "tokens_per_second/", "train_", "step_time")
    return [{k: v for k, v in log.items() if not k.startswith(keys)} for log in trainer.state.log_history]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("two adapters", {"anchor_states": "keep"}),
        ("full anchor", {"anchor_states": "offload"}),
        ("two adapters", {"alpha_controller": "kl_budget", "kl_budget": 1e-4}),
    ],
)
def test_a_run_resumes_bit_for_bit_between_updates_on_the_same_rollouts(kind, options, folders, tmp_path):
    options = {"kind": kind} | options
    whole = trainer_of(tmp_path / "run", folders, save_strategy="steps", save_steps=8, **options)
    whole.train()
    alphas = {log["alpha"] for log in whole.state.log_history if "alpha" in log}
    assert len(alphas) >= 2, "alpha changes, so resuming it is tested"
    resumed = trainer_of(tmp_path / "run", folders, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert logs(resumed)[:12] == logs(whole)[:12]
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


KL = {"loss_type": "grpo", "dynamic_sampling": "off", "beta": 0.1, "kl_to": "anchor"}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("two adapters", {}),
        ("base anchor", {"dynamic_sampling": "refill", "max_refills": 2}),
        ("two adapters", KL),
        ("full anchor", {"alpha_controller": "linear", "alpha_end": 0.0}),
    ],
    ids=["filter", "refill", "kl", "to alpha 0"],
)
def test_the_fused_loss_head_trains_like_the_reference(kind, options, folders, tmp_path):
    trained = []
    for loss_head in ("fused", "reference"):
        trainer = trainer_of(tmp_path / loss_head, folders, kind, loss_head=loss_head, optim="sgd", **options)
        set_seed(0)
        trainer.train()
        trained.append(trainer)
    fused, reference = trained
    alphas = [log.get("alpha") for log in logs(fused)]
    assert len(set(alphas)) >= 3
    assert alphas == [log.get("alpha") for log in logs(reference)]
    torch.testing.assert_close(fused.model.state_dict(), reference.model.state_dict(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_trains_with_the_reference_loss_head(adapter, folders, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the head of policy.*has a parameter.*loss_head=\"reference\""):
        trainer_of(tmp_path / "fused", folders, adapter=adapter)
    trainer = trainer_of(tmp_path / "run", folders, adapter=adapter, loss_head="reference", max_steps=2)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("lm_head" in name for name in moved)
    assert all(".policy" in name for name in moved)
