"""A student of a mixture is an ordinary model in vLLM."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from transformers import AutoModelForCausalLM

from tests.helpers.distill import distiller_of
from tests.helpers.engines import assert_matches_transformers, engine
from tests.helpers.vllm_members import build_mixture


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
