"""Two processes that share each layer of each member."""

import os

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from tests.helpers.engines import assert_same, engine, mixture_of


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process needs a core of its own")
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    mixture = mixture_of("qwen2", "qwen3", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, tensor_parallel_size=2) as llm:
        assert_same(mixture, llm)
        assert_same(mixture, llm, prompt_logprobs=0)
