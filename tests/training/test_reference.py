"""The reference of a KL is the model that the run starts from, and an adapter trains as an adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from logitmix.cli.__main__ import main
from tests.helpers.grpo import trainer_of
from tests.helpers.members import character_tokenizer, tiny_member

KL = {"loss_type": "grpo", "beta": 0.1}


@pytest.fixture
def folders(tmp_path):
    """A base, and a trained adapter on it."""
    tiny_member("qwen2").save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        get_peft_model(load(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "base"), str(tmp_path / "adapter")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def kls(trainer):
    return [line["kl"] for line in trainer.state.log_history if "kl" in line]


MODELS = {
    "the folder of an adapter": lambda base, adapter: {"model": adapter},
    "an adapter in memory": lambda base, adapter: {
        "model": PeftModel.from_pretrained(load(base), adapter, is_trainable=True)
    },
    "a merged adapter in memory": lambda base, adapter: {
        "model": PeftModel.from_pretrained(load(base), adapter).merge_and_unload().requires_grad_(True)
    },
    "a model": lambda base, adapter: {"model": base},
    "a new adapter": lambda base, adapter: {"model": base, "peft_config": LoraConfig(target_modules=["q_proj"])},
    "a mixture of an adapter with itself": lambda base, adapter: {
        "model": adapter, "anchor": adapter, "kl_to": "anchor"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_kl_is_zero_at_the_start(tmp_path, folders, name):
    trainer = trainer_of(tmp_path / "run", **KL, **MODELS[name](*folders))
    trainer.train()
    first, second = kls(trainer)
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-4


@pytest.mark.parametrize("options", [{}, KL, {"anchor": "base", "alpha": 0.3}], ids=["alone", "KL", "mixture"])
def test_an_adapter_trains_as_an_adapter(tmp_path, folders, options):
    base, adapter = folders
    trainer = trainer_of(tmp_path / "run", adapter, **options | ({"anchor": base} if "anchor" in options else {}))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def test_a_resumed_adapter_with_a_reference_matches_an_uninterrupted_run(tmp_path, folders):
    options = {**KL, "model": folders[1], "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = trainer_of(tmp_path / "run", **options)
    whole.train()
    resumed = trainer_of(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert kls(resumed) == kls(whole)
    for expected, value in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, value)


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path, folders):
    base, adapter = folders
    tiny_member("qwen2", num_hidden_layers=3).save_pretrained(base)
    with pytest.raises(ValueError, match="weights are missing"):
        trainer_of(tmp_path / "run", adapter)


def test_a_model_without_weights_that_train_is_refused(tmp_path, folders):
    base, adapter = folders
    for model in (PeftModel.from_pretrained(load(base), adapter), load(adapter)):
        with pytest.raises(ValueError, match=r"no weights that train.*is_trainable=True"):
            trainer_of(tmp_path / "run", model)


def test_a_new_adapter_that_starts_away_from_its_base_is_refused_with_a_kl(tmp_path, folders):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"init_lora_weights is False.*reference is the base"):
        trainer_of(tmp_path / "run", folders[0], peft_config=config, **KL)
    trainer_of(tmp_path / "run", folders[0], peft_config=config)


def test_a_reference_that_follows_the_policy_is_refused_with_an_adapter(tmp_path, folders):
    with pytest.raises(ValueError, match="sync_ref_model"):
        trainer_of(tmp_path / "run", folders[1], sync_ref_model=True, **KL)


@pytest.mark.parametrize(
    ("model", "flags", "reference"),
    [
        (1, [], "a frozen copy of the adapter"),
        (0, [], "a frozen copy of the model"),
        (0, ["--use_peft"], "the model without its adapter"),
        (1, ["--anchor", "base", "--kl_to", "anchor"], "the anchor"),
    ],
)
def test_a_dry_run_lists_the_reference_and_its_memory(capsys, folders, model, flags, reference):
    flags = [folders[0] if flag == "base" else flag for flag in flags]
    command = ["train", "--model_name_or_path", folders[model], "--output_dir", "run", "--beta", "0.01"]
    options = ["--loss_type", "grpo", "--use_cpu", "true", "--bf16", "false", "--train_limit", "64", "--dry_run"]
    assert main([*command, *options, *flags]) == 0
    printed = capsys.readouterr().out
    assert reference in printed
    held = "reference: a frozen copy" in printed or "reference's weights" in printed
    assert held == reference.startswith("a frozen copy")


DTYPES = [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": torch.bfloat16}]


@pytest.mark.parametrize("given", DTYPES)
def test_a_dtype_is_read_by_either_name(tmp_path, folders, given):
    for options in ({}, {"anchor": folders[0]}):
        assert trainer_of(tmp_path, folders[0], model_init_kwargs=given, **options).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16'"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype 'bfloat16' and dtype 'float32'"),
        ({"atn_implementation": "sdpa"}, "'atn_implementation', which neither"),
    ],
)
def test_model_init_kwargs_that_nothing_reads_are_refused(tmp_path, folders, given, message):
    for options in ({}, {"anchor": folders[1]}):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, folders[0], model_init_kwargs=given, **options)
    with pytest.raises(ValueError, match="loaded already"):
        trainer_of(tmp_path, tiny_member(), model_init_kwargs=given)
