"""A student of a mixture is an ordinary model in vLLM, or an ordinary LoRA adapter on its base."""

import json

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.students import build_student
from tests.helpers.adapters import lora
from tests.helpers.distill import distiller_of
from tests.helpers.engines import assert_matches_transformers, engine
from tests.helpers.vllm_members import build_mixture, save_member


def test_a_student_matches_transformers(tmp_path):
    trainer = distiller_of(tmp_path, build_mixture("qwen2", "llama", alpha=0.4), max_steps=1)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert "logitmix" not in json.dumps(config)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert_matches_transformers(student, llm, requests=[{}] * 4)


def adapter_student(folder, base, source="policy", **config):
    """Distil a mixture of an adapter and its base into another adapter on that base; return it as PEFT loads it."""
    torch.manual_seed(0)
    teacher = LogitMixForCausalLM.from_members(base, base, alpha=0.4, peft_config=lora(init_lora_weights=False))
    student = build_student(teacher, source, peft_config=lora(**config))
    trainer = distiller_of(folder, teacher, student, max_steps=1, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    return AutoPeftModelForCausalLM.from_pretrained(folder).get_base_model()


def test_adapters_match_peft_on_their_base(tmp_path):
    from vllm.lora.request import LoRARequest

    base = save_member(tmp_path / "base")
    students = {
        "same": adapter_student(tmp_path / "same", base),
        "all linear": adapter_student(tmp_path / "all linear", base, "anchor", r=6, target_modules="all-linear"),
    }
    with engine(base, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        for i, (name, student) in enumerate(students.items()):
            request = LoRARequest(name, i + 1, str(tmp_path / name))
            assert_matches_transformers(student, llm, requests=[{}] * 4, lora_request=request)
