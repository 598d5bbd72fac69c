"""How the middleware of vLLM's server reads and writes JSON."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.http import MixtureFields, _score, move_mixture_fields, parse_object, to_json


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


def respond(
    request, path="/v1/completions", answer=b'{"choices": []}', logprobs_mode="raw_logprobs", root="", generate=None
):
    """The status and body that the middleware answers with, and the request that reaches the server behind it.

    `generate` is that of the engine, which scores `member_logprobs`.
    """
    from transformers import LlamaConfig, Qwen2Config

    passed, sent = [], []

    async def app(scope, receive, send):
        passed.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def receive():
        return {"type": "http.request", "body": json.dumps(request).encode()}

    async def send(message):
        sent.append(message)

    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()], alpha_range=[0.0, 1.0])
    model_config = SimpleNamespace(hf_config=config, logprobs_mode=logprobs_mode, max_model_len=6)
    client = SimpleNamespace(model_config=model_config, generate=generate)
    state = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    scope = {"type": "http", "method": "POST", "path": root + path, "root_path": root, "app": state, "headers": []}
    asyncio.run(MixtureFields(app)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), passed


WRONG_TYPES = {
    "alpha": ["0.3", True, [0.3], {"anchor": 0.3}, float("nan"), 10**400],
    "weights": [0.3, "half", True, {}, [], [0.5], [0.5, "0.5"], [0.5, True], [0.5, None], [[0.5, 0.5]], [0.5, {}]],
    "member": [1, 0.5, True, ["policy"], {"policy": 1}, "", []],
    "member_prompts": [1, "text", True, [], {}, ["text"], {"anchor": "text"}],
    "member_logprobs": ["false", 2, 0.5, [], [True], {}],
    "vllm_xargs": [1, "alpha", True, False, [], ["alpha"]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values], ids=str
)
def test_a_field_of_a_wrong_type_returns_status_400_and_one_sentence(name, value):
    requests = [{name: value}]
    if name not in ("member_logprobs", "vllm_xargs"):
        requests.append({"vllm_xargs": {name: value}})
    for request in requests:
        status, body, passed = respond({"prompt": "a"} | request)
        assert (status, passed) == (400, [])
        assert body["error"]["message"].count("\n") == 0
        assert body["error"]["code"] == 400


@pytest.mark.parametrize("value", ["yes", 2, [], {}])
def test_return_token_ids_of_a_wrong_type_returns_status_400_beside_member_logprobs(value):
    status, body, _ = respond({"member_logprobs": True, "return_token_ids": value})
    assert status == 400
    assert "return_token_ids is" in body["error"]["message"]
    assert respond({"return_token_ids": value})[2] == [{"return_token_ids": value}]  # vLLM reports it


def test_fields_that_are_null_are_left_out():
    nulls = dict.fromkeys(("alpha", "weights", "member", "member_prompts", "member_logprobs", "vllm_xargs"))
    status, _, passed = respond({"prompt": "a"} | nulls)
    assert status == 200
    assert "alpha" not in (passed[0].get("vllm_xargs") or {})
    assert passed[0]["prompt"] == "a"
    assert respond({"alpha": 0.3, "weights": None})[2] == [{"vllm_xargs": {"alpha": 0.3}}]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions/batch", "/inference/v1/generate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0.3), ("weights", [0.5, 0.5]), ("member", "policy"), ("member_logprobs", True), ("member_prompts", {})],
)
def test_a_field_at_a_path_that_does_not_read_it_returns_status_400(path, name, value):
    status, body, passed = respond({"prompt": "x", name: value}, path)
    assert (status, passed) == (400, [])
    assert body["error"]["message"].startswith(f"{path} does not read {name}; use one of /v1/completions, ")
    request = {"prompt": "x", name: None}
    assert respond(request, path)[0::2] == (200, [request])


def refusal(request, **kwargs):
    """The message of status 400, before the request reaches the server."""
    status, body, passed = respond({"prompt": "a"} | request, **kwargs)
    assert (status, passed) == (400, [])
    return body["error"]["message"]


def test_two_values_of_a_field_return_status_400():
    message = "alpha is 0.3, but 0.7 in vllm_xargs; set only one of them"
    assert refusal({"alpha": 0.3, "vllm_xargs": {"alpha": 0.7}}) == message
    assert "the request sets alpha and member" in refusal({"alpha": 0.3, "vllm_xargs": {"member": "policy"}})
    for xargs in ({"alpha": 0.3}, {"alpha": None}):
        assert respond({"alpha": 0.3, "vllm_xargs": xargs})[2] == [{"vllm_xargs": {"alpha": 0.3}}]


@pytest.mark.parametrize("request_", [{"alpha": 0.3}, {"vllm_xargs": {"alpha": 0.3}}])
def test_weights_that_beam_search_would_ignore_return_status_400(request_):
    assert "would ignore the request's weights; leave out alpha, or" in refusal(request_ | {"use_beam_search": True})
    assert respond({"use_beam_search": True})[0] == respond(request_ | {"use_beam_search": False})[0] == 200


def test_member_logprobs_that_would_change_or_mismeasure_a_completion_return_status_400():
    request = {"member_logprobs": True}
    assert "without stream; leave it out" in refusal(request | {"stream": True})
    assert "without stream; leave it out" in refusal(request, path="/v1/responses")
    assert "leave out echo, or set return_token_ids to true" in refusal(request | {"echo": True})
    for others in ({"echo": False}, {"echo": True, "return_token_ids": True}):
        assert respond(request | others)[0] == 200
    assert respond(request | {"echo": True}, "/v1/chat/completions")[0] == 200
    for mode in ("raw_logits", "processed_logits"):
        assert f"--logprobs-mode is {mode}, but member_logprobs" in refusal(request, logprobs_mode=mode)
        assert respond({"alpha": 0.3}, logprobs_mode=mode)[0] == 200


def test_member_logprobs_of_tokens_that_the_server_hides_return_status_400():
    answer = json.dumps({"prompt_token_ids": [5], "choices": [{"index": 0, "token_ids": None}]}).encode()
    status, body, _ = respond({"member_logprobs": True}, "/v1/chat/completions", answer)
    assert status == 400
    assert body["error"]["message"].endswith("set include_reasoning to true")


@pytest.mark.parametrize("salt", [{}, {"cache_salt": None}, {"cache_salt": "a tenant"}], ids=str)
def test_members_are_scored_in_the_prefix_cache_of_the_requests_salt(salt):
    prompts = []

    async def generate(prompt, params, request_id):
        prompts.append(prompt)
        position = {7: SimpleNamespace(logprob=-1.0)}
        yield SimpleNamespace(prompt_logprobs=[None, {}, position], outputs=[SimpleNamespace(logprobs=None)])

    answer = json.dumps({"choices": [{"prompt_token_ids": [5, 6], "token_ids": [7]}]}).encode()
    status, body, passed = respond({"member_logprobs": True} | salt, answer=answer, generate=generate)
    assert (status, body) == (200, {"choices": [{"member_logprobs": {"policy": [-1.0], "anchor_0": [-1.0]}}]})
    assert prompts == [{"prompt_token_ids": [5, 6, 7]} | {key: value for key, value in salt.items() if value}] * 2
    assert passed == [salt | {"return_token_ids": True}]


def test_fields_are_read_behind_a_proxy_with_a_path_of_its_own():
    assert respond({"alpha": 0.3}, root="/models")[2] == [{"vllm_xargs": {"alpha": 0.3}}]
    assert respond({"alpha": 0.3}, "/v1/messages", root="/models")[0] == 400


def test_an_answer_to_a_client_that_has_left_passes_through():
    assert respond({"member_logprobs": True}, answer=b"null")[:2] == (200, None)


def scored(completion, log_probs, context=6, mode="raw_logprobs"):
    """The scores of a completion of a prompt of two tokens, and what the engine was asked for."""
    asked = []

    async def generate(prompt, params, request_id):
        asked.append((prompt["prompt_token_ids"], params))
        values = [SimpleNamespace(logprob=value) for value in log_probs]
        positions = [dict([pair]) for pair in zip(completion, values, strict=True)]
        kept = len(prompt["prompt_token_ids"]) - 2
        yield SimpleNamespace(
            prompt_logprobs=[None, {}, *positions[:kept]],
            outputs=[SimpleNamespace(logprobs=positions[kept:] if params.logprobs is not None else None)],
        )

    config = SimpleNamespace(max_model_len=context, logprobs_mode=mode)
    engine = SimpleNamespace(generate=generate, model_config=config)
    return asyncio.run(_score(engine, [5, 6], completion, "policy")), *asked[0]


def test_infinite_log_probs_are_numbers_of_json():
    scores, ids, _ = scored([7, 8], [-1.5, -float("inf")])
    assert (scores, ids) == ([-1.5, -9999.0], [5, 6, 7, 8])


def test_the_last_token_of_a_completion_that_fills_the_context_is_generated():
    scores, ids, params = scored([7, 8, 9, 10], [-1.0, -2.0, -3.0, -4.0])
    assert (scores, ids, params.allowed_token_ids) == ([-1.0, -2.0, -3.0, -4.0], [5, 6, 7, 8, 9], [10])
    with pytest.raises(
        ValueError, match="fills the context of 6 tokens, which can be scored with --logprobs-mode raw"
    ):
        scored([7, 8, 9, 10], [-1.0] * 4, mode="processed_logprobs")
