"""How the middleware of vLLM's server reads and writes JSON."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.http import move_mixture_fields, parse_object, to_json


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_body_that_is_no_object_is_left_to_vllm(body):
    assert parse_object(body) is None


@pytest.mark.parametrize("text", ["é", "\U0001f600", "\ud800"], ids=["letter", "pair", "half a pair"])
def test_texts_pass_through_unchanged(text):
    assert parse_object(to_json({"prompt": text})) == {"prompt": text}


@pytest.mark.parametrize("value", [[], ["alpha"], "alpha", 1, False])
def test_vllm_xargs_must_be_an_object(value):
    from transformers import LlamaConfig, Qwen2Config

    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()])
    with pytest.raises(ValueError, match=r"vllm_xargs is .*, but must be an object"):
        move_mixture_fields({"alpha": 0.5, "vllm_xargs": value}, config)
    request = {"alpha": 0.5, "vllm_xargs": {"other": 1}}
    assert move_mixture_fields(request, config) == [0.5, 0.5]
    assert request == {"vllm_xargs": {"other": 1, "alpha": 0.5}}
    assert json.loads(to_json(request)) == request


@pytest.mark.parametrize(
    "request_", [{"member_prompts": {"anchor": "x"}}, {"vllm_xargs": {"member_prompts": {"anchor": "x"}}}]
)
def test_a_prompt_of_a_member_is_refused(request_):
    from transformers import LlamaConfig, Qwen2Config

    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()])
    with pytest.raises(ValueError, match="a request cannot set member_prompts"):
        move_mixture_fields(request_, config)
