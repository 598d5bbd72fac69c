"""vLLM's OpenAI-compatible server of a mixture, called by the official client."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import httpx
import openai

from tests.helpers.engines import IS_INTERPRETED, TOLERANCE, greedy_tokens, token_log_probs
from tests.helpers.members import VOCAB_SIZE
from tests.helpers.servers import Server

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def server(folder):
    engine = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "32"]
    server = Server(folder / "mixture", folder / "log.txt", *engine)
    yield server
    server.kill()


def complete(client, prompt=PROMPT, fields=None, **kwargs):
    arguments = {"temperature": 0, "max_tokens": 8, "logprobs": 0} | kwargs
    extra = {"return_token_ids": True, "ignore_eos": True} | (fields or {})
    return client.completions.create(model="mixture", prompt=prompt, extra_body=extra, **arguments)


@pytest.mark.runners
def test_concurrent_requests_each_have_their_own_alpha(client, mixture):
    N = 16 if IS_INTERPRETED else 64
    requests = [([3 + (7 * i + j) % (VOCAB_SIZE - 3) for j in range(2 + i % 9)], i / (N - 1)) for i in range(N)]
    with ThreadPoolExecutor(N) as pool:
        answers = list(pool.map(lambda pair: complete(client, pair[0], {"alpha": pair[1]}), requests))
    for (prompt, alpha), answer in zip(requests, answers, strict=True):
        (choice,) = answer.choices
        assert choice.token_ids == greedy_tokens(mixture, prompt, 8, alpha=alpha)
        expected = token_log_probs(mixture, prompt + choice.token_ids, alpha=alpha)[len(prompt) - 1 :]
        assert max(abs(a - b) for a, b in zip(expected.tolist(), choice.logprobs.token_logprobs, strict=True)) < (
            TOLERANCE
        )
    metrics = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert "logitmix_request_alpha_count" in metrics
    assert "vllm:generation_tokens_total" in metrics


@pytest.mark.runners
def test_requests_can_set_weights_and_members_and_get_member_logprobs(client, mixture):
    fields = {"weights": [0.8, 0.2], "member_logprobs": True, "cache_salt": "a tenant"}
    (choice,) = complete(client, fields=fields).choices
    assert choice.token_ids == greedy_tokens(mixture, PROMPT, 8, alpha=0.2)
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        expected = token_log_probs(mixture, PROMPT + choice.token_ids, alpha=alpha)[len(PROMPT) - 1 :].tolist()
        assert max(abs(a - b) for a, b in zip(expected, choice.member_logprobs[name], strict=True)) < TOLERANCE
        (alone,) = complete(client, fields={"member": name}).choices
        assert alone.token_ids == greedy_tokens(mixture, PROMPT, 8, alpha=alpha)


@pytest.mark.runners
def test_member_logprobs_of_several_completions_of_which_some_fill_the_context(client, mixture):
    prompts = [[3 + i % (VOCAB_SIZE - 3) for i in range(120)], PROMPT]
    fields = {"alpha": 0.3, "member_logprobs": True}
    choices = complete(client, prompts, fields, max_tokens=8, temperature=1, n=2).choices
    for prompt, choice in zip([prompt for prompt in prompts for _ in range(2)], choices, strict=True):
        assert len(choice.token_ids) == 8
        for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
            expected = token_log_probs(mixture, prompt + choice.token_ids, alpha=alpha)[len(prompt) - 1 :].tolist()
            assert max(abs(a - b) for a, b in zip(expected, choice.member_logprobs[name], strict=True)) < TOLERANCE


def test_the_responses_api(client, mixture):
    response = client.responses.create(
        model="mixture",
        input="ab12",
        temperature=0,
        max_output_tokens=8,
        extra_body={"alpha": 0.7, "ignore_eos": True},
    )
    tokens = greedy_tokens(mixture, mixture.tokenizer("ab12=")["input_ids"], 8, alpha=0.7)
    assert response.output_text == mixture.tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat_with_and_without_streaming(client, mixture):
    prompt = mixture.tokenizer("ab12=")["input_ids"]
    arguments = {
        "model": "mixture",
        "messages": [{"role": "user", "content": "ab12"}],
        "temperature": 0,
        "max_tokens": 8,
        "extra_body": {"alpha": 0.7, "ignore_eos": True},
    }
    expected = mixture.tokenizer.decode(greedy_tokens(mixture, prompt, 8, alpha=0.7), skip_special_tokens=True)
    assert client.chat.completions.create(**arguments).choices[0].message.content == expected
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.runners
def test_stop_strings_seeds_and_n_work_as_in_vllm(client):
    text = complete(client, max_tokens=16).choices[0].text
    assert complete(client, max_tokens=16, stop=[text[3]]).choices[0].text == text[: text.index(text[3])]
    sampled = [
        [choice.token_ids for choice in complete(client, fields={"alpha": 0.5}, temperature=1, n=3, seed=7).choices]
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    assert len(set(map(tuple, sampled[0]))) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, but this server takes 0.0 to 1.0"),
        ({"alpha": 0.5, "weights": [0.5, 0.5]}, "the request sets alpha and weights; set only one of them"),
        ({"weights": [0.2, 0.3, 0.5]}, "2 members"),
        ({"member": "teacher"}, "there is no member 'teacher'; the members are policy, anchor_0"),
        ({"alpha": None, "weights": "half"}, "weights is 'half', but must be a list of numbers"),
        ({"alpha": 0.5, "vllm_xargs": ["alpha"]}, "vllm_xargs is ['alpha'], but must be an object"),
        ({"member": ["policy"]}, "there is no member ['policy']"),
    ],
)
@pytest.mark.runners
def test_invalid_fields_return_status_400(client, fields, message):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, fields=fields)
    assert message in caught.value.message


def test_a_too_long_prompt_and_an_unknown_model_are_rejected(client):
    with pytest.raises(openai.BadRequestError, match="128"):
        complete(client, [5] * 200)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt=PROMPT)


def stream_long(client):
    """Many samples; the first token comes long before the last."""
    fields = {"ignore_eos": True, "alpha": 0.9}
    return client.completions.create(
        model="mixture", prompt=PROMPT, max_tokens=110, n=64, stream=True, extra_body=fields
    )


@pytest.mark.runners
def test_the_server_works_after_a_cancelled_request(client, mixture):
    with stream_long(client) as stream:
        next(stream)  # the request is being decoded; leaving the block closes its connection
    assert complete(client).choices[0].token_ids == greedy_tokens(mixture, PROMPT, 8)


@pytest.mark.slow
def test_the_server_works_after_being_killed(server, client, mixture):
    expected = greedy_tokens(mixture, PROMPT, 8)
    before = {path.name: path.read_bytes() for path in server.folder.iterdir()}
    streams = [stream_long(client) for _ in range(4)]
    next(streams[0])  # the server is decoding
    server.kill()
    with pytest.raises((httpx.HTTPError, openai.APIConnectionError)):
        [list(stream) for stream in streams]
    server.start()
    assert complete(client).choices[0].token_ids == expected
    assert {path.name: path.read_bytes() for path in server.folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.runners
def test_the_server_decodes_alternately(folder, mixture):
    """The scheduler and the worker run in a process of their own here."""
    engine = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--decoding", "alternating"]
    server = Server(folder / "mixture", folder / "alternating.txt", *engine)
    try:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
        fields = {"member_logprobs": True}
        for alpha in (0.2, 0.8):
            (choice,) = complete(client, fields={"alpha": alpha, **fields}, max_tokens=16).choices
            assert choice.token_ids == greedy_tokens(mixture, PROMPT, 16, alpha=alpha)
            assert set(choice.member_logprobs) == {"policy", "anchor_0"}
        with pytest.raises(openai.BadRequestError, match="structured_outputs"):
            complete(client, fields={"structured_outputs": {"regex": "a+"}})
        metrics = httpx.get(f"{server.url}/metrics").text
    finally:
        server.kill()
    (drafts,) = re.findall(r"vllm:spec_decode_num_drafts_total\{.*\} ([\d.]+)", metrics)
    assert float(drafts) > 0
