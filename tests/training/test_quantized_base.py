"""Adapters on a base with quantised weights: they train, and checkpoints refer to the base."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.students import build_student
from tests.helpers.grpo import trainer_of
from tests.helpers.members import character_tokenizer, logits, tiny_member

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    tiny_member("qwen2", 0, hidden_size=64).save_pretrained(folder / "base")
    character_tokenizer().save_pretrained(folder / "base")
    made = LogitMixForCausalLM.from_members(str(folder / "base"), str(folder / "base"), peft_config=LORA)
    made.export_member("policy", folder / "adapter")
    return folder


def trainer(members, run, quantization, anchor, **kwargs):
    return trainer_of(
        run, str(members / "base"), anchor=str(members / anchor),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        model_init_kwargs={"quantization_config": quantization}, save_strategy="steps", save_steps=1,
        lr_scheduler_type="constant", **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize(
    "quantization",
    ["int8", "bitsandbytes-4bit", pytest.param({"load_in_8bit": True}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("anchor", ["base", "adapter"])
def test_the_adapter_alone_trains_and_a_run_resumes_exactly(members, tmp_path, quantization, anchor):
    whole = trainer(members, tmp_path / "whole", quantization, anchor, max_steps=2)
    assert whole.model.config.quantized_models == ["policy"]
    assert all("lora" in name for name, weight in whole.model.named_parameters() if weight.requires_grad)
    whole.train()
    trainer(members, tmp_path / "run", quantization, anchor, max_steps=1).train()
    resumed = trainer(members, tmp_path / "run", quantization, anchor, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    expected = logits(whole.model.eval())
    resumed.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert all(".policy." in name and "lora" in name for name in load_file(folder / "model.safetensors"))
        loaded = LogitMixForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(loaded), expected)
        assert loaded.weight_bytes() == whole.model.weight_bytes()
    resumed.model.export_member("policy", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("quantization", ["int8", "bitsandbytes-4bit"])
def test_the_policys_adapter_becomes_the_anchors_and_a_resumed_run_has_it(members, tmp_path, quantization):
    options = {"max_steps": 2, "reanchor_steps": 1}
    whole = trainer(members, tmp_path, quantization, "base", **options)
    whole.train()
    assert torch.equal(logits(whole.model.eval(), alpha=0.0), logits(whole.model, alpha=1.0))
    resumed = trainer(members, tmp_path, quantization, "base", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for model in (resumed.model.eval(), loaded):
        assert torch.equal(logits(model), logits(whole.model))


@pytest.mark.parametrize("quantization", ["int8", "bitsandbytes-4bit"])
def test_a_student_is_an_adapter_on_the_quantised_base(members, quantization):
    teacher = LogitMixForCausalLM.from_members(
        str(members / "adapter"), str(members / "base"), quantization_config={"policy": quantization}
    )
    student = build_student(teacher, "policy", peft_config=LoraConfig(r=2, target_modules="all-linear"))
    held = {id(p) for p in teacher.parameters()}
    assert all(".default." in name for name, p in student.named_parameters() if id(p) not in held)
    assert torch.equal(logits(student.eval()), logits(teacher, alpha=0.0))


def test_such_a_mixture_is_not_saved_by_itself(members, tmp_path):
    model = LogitMixForCausalLM.from_members(
        str(members / "base"), str(members / "base"), peft_config=LORA, quantization_config={"policy": "int8"}
    )
    with pytest.raises(ValueError, match="an adapter on a quantised base, which a mixture is not saved with"):
        model.save_pretrained(tmp_path)
