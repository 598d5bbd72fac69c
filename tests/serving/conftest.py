"""vLLM's environment, and what the tests of both servers share: a saved mixture and the official client.

`VLLM_USE_V2_MODEL_RUNNER=1` runs the tests on vLLM's second model runner; without it vLLM chooses the runner.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.vllm_sources import REASONS, SOURCES

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and find_spec("triton") and not torch.cuda.is_available():
    from tests.helpers import triton_cpu

    triton_cpu.install()


@pytest.fixture(scope="session", autouse=True)
def quick_engines():
    from tests.helpers.engines import quick_garbage_collection

    with quick_garbage_collection():
        yield


@pytest.fixture(params=SOURCES)
def vllm(request):
    """vLLM's source: of the installed version, and of the newest."""
    if SOURCES[request.param] is None:
        pytest.skip(REASONS[request.param])
    return SOURCES[request.param]


@pytest.fixture(scope="module")
def mixture():
    from tests.helpers.servers import CHAT_TEMPLATE
    from tests.helpers.vllm_members import build_mixture

    model = build_mixture("qwen2", "llama", alpha=0.4)
    model.tokenizer.chat_template = CHAT_TEMPLATE
    return model


@pytest.fixture(scope="module")
def folder(mixture, tmp_path_factory):
    """A folder that holds the mixture as `mixture`, saved with an alpha that the server's flags override.

    Its `generation_config` would change every response, if a server obeyed it.
    """
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("served")
    mixture.alpha = 0.9
    mixture.save_pretrained(folder / "mixture")
    mixture.alpha = 0.4
    GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.5, repetition_penalty=5.0, max_new_tokens=3,
        min_new_tokens=2, suppress_tokens=list(range(3, 20)), no_repeat_ngram_size=1,
    ).save_pretrained(folder / "mixture")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
