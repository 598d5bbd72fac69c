"""Tensor parallelism: each layer of each member split over two processes."""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from tests.helpers.engines import assert_matches_transformers, engine
from tests.helpers.vllm_members import build_mixture


@pytest.mark.slow
@pytest.mark.runners
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process needs its own core")
def test_two_processes_match_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    mixture = build_mixture("qwen2", "qwen3", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, tensor_parallel_size=2) as llm:
        assert_matches_transformers(mixture, llm)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)
