"""Training beside an anchor with quantised weights: the ratio, checkpoints, resuming, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from logitmix.mixture.frozen.references import STORE
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.checkpointing.folders import fault
from tests.helpers.commands import TINY, error_of
from tests.helpers.grpo import trainer_of
from tests.helpers.members import character_tokenizer, logits, tiny_member

pytest.importorskip("torchao")

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    for name, seed in (("policy", 0), ("anchor", 1)):
        tiny_member("qwen2", seed, hidden_size=64).save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    return folder


def trainer(members, run, quantization="int8", **kwargs):
    return trainer_of(
        run, str(members / "policy"), anchor=str(members / "anchor"), anchor_quantization=quantization, **kwargs
    )


@pytest.mark.parametrize("quantization", ["int8", "int4", "bitsandbytes-8bit", "bitsandbytes-4bit"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_the_ratio_is_exactly_1_before_an_update(members, tmp_path, autocast, quantization):
    made = trainer(
        members, tmp_path, quantization, bf16=autocast, max_steps=1, num_iterations=2, steps_per_generation=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert made.model.config.quantized_models == ["anchor_0"]
    made.train()
    (log,) = (row for row in made.state.log_history if "ratio/min" in row)
    assert (log["ratio/min"], log["ratio/max"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    "mode", ["once", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("always", "never"))]
)
def test_checkpoints_and_the_model_load_bit_for_bit_and_a_run_resumes_exactly(members, tmp_path, mode):
    run, whole = tmp_path / "run", trainer(members, tmp_path / "whole", save_frozen=mode, **(STEPS | {"max_steps": 3}))
    whole.train()
    made = trainer(members, run, save_frozen=mode, **STEPS)
    made.train()
    expected = logits(made.model)
    checkpoint = run / "checkpoint-2"
    assert (checkpoint / "anchor_0").exists() == (mode == "always")
    assert (run / STORE / "anchor_0" / "model.safetensors").exists() == (mode == "once")
    assert fault(checkpoint) is None
    for cls in (LogitMixForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(cls.from_pretrained(checkpoint)), expected)

    resumed = trainer(members, run, save_frozen=mode, **(STEPS | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    resumed.save_model()
    assert not (run / STORE).exists()
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(run)), logits(whole.model))
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(checkpoint)), expected)
    shutil.move(run, tmp_path / "moved")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "moved" / "checkpoint-2")), expected)


def test_a_stored_anchor_that_is_lost_or_changed_is_named(members, tmp_path):
    trainer(members, tmp_path / "run", **STEPS).train()
    stored = tmp_path / "run" / STORE / "anchor_0" / "model.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(ValueError, match=r"frozen weights of anchor_0 in .* are not those that the run saved"):
        LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    stored.write_bytes(content[:-1])
    assert fault(tmp_path / "run" / "checkpoint-2").startswith(f"its {STORE}/anchor_0/model.safetensors has")


def test_the_anchor_takes_the_disk_of_its_bits(members, tmp_path):
    made = trainer(members, tmp_path / "run", **(STEPS | {"max_steps": 1}))
    made.train()
    made.save_model()
    layers = load_file(tmp_path / "run" / "anchor_0" / "model.safetensors")
    assert sum(w.nbytes for w in layers.values()) < 0.4 * sum(p.nbytes for p in made.model.policy.parameters())
    assert not any("anchor" in name for name in load_file(tmp_path / "run" / "model.safetensors"))


def test_refusals(members, tmp_path, capfd):
    with pytest.raises(ValueError, match="anchor_quantization is 'int8', but nothing would read it"):
        trainer_of(tmp_path, str(members / "policy"), anchor_quantization="int8")
    policy, anchor = str(members / "policy"), str(members / "anchor")
    argv = ["train", "--model_name_or_path", policy, "--anchor", anchor, "--output_dir", str(tmp_path / "a"), *TINY]
    assert "the quantisation is 'int5'; it must be int8, int4" in error_of(
        capfd, [*argv, "--anchor_quantization", "int5"]
    )
    quantized = LogitMixForCausalLM.from_members(policy, anchor, quantization_config={"policy": "int8"})
    with pytest.raises(ValueError, match="the policy has quantised weights, which cannot train"):
        trainer_of(tmp_path, quantized)
