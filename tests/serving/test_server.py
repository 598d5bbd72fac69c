"""vLLM's OpenAI-compatible server with a mixture, asked by the official client."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import httpx
import openai

from tests.helpers.engines import TOLERANCE, greedy_tokens, token_log_probs
from tests.helpers.members import VOCAB_SIZE
from tests.helpers.servers import Server

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def server(folder):
    engine = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "32"]
    server = Server(folder / "mixture", folder / "log.txt", *engine)
    yield server
    server.kill()


def ask(client, prompt=PROMPT, fields=None, **kwargs):
    arguments = {"temperature": 0, "max_tokens": 8, "logprobs": 0} | kwargs
    extra = {"return_token_ids": True, "ignore_eos": True} | (fields or {})
    return client.completions.create(model="mixture", prompt=prompt, extra_body=extra, **arguments)


def test_64_requests_at_once_each_with_its_own_alpha(client, mixture):
    asked = [([3 + (7 * i + j) % (VOCAB_SIZE - 3) for j in range(2 + i % 9)], i / 63) for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda pair: ask(client, pair[0], {"alpha": pair[1]}), asked))
    for (prompt, alpha), answer in zip(asked, answers, strict=True):
        (choice,) = answer.choices
        assert choice.token_ids == greedy_tokens(mixture, prompt, 8, alpha=alpha)
        expected = token_log_probs(mixture, prompt + choice.token_ids, alpha=alpha)[len(prompt) - 1 :]
        assert max(abs(a - b) for a, b in zip(expected.tolist(), choice.logprobs.token_logprobs, strict=True)) < (
            TOLERANCE
        )
    metrics = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert "logitmix_request_alpha_count" in metrics
    assert "vllm:generation_tokens_total" in metrics


def test_weights_a_member_and_the_log_probs_of_each_member(client, mixture):
    (choice,) = ask(client, fields={"weights": [0.8, 0.2], "member_logprobs": True}).choices
    assert choice.token_ids == greedy_tokens(mixture, PROMPT, 8, alpha=0.2)
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        expected = token_log_probs(mixture, PROMPT + choice.token_ids, alpha=alpha)[len(PROMPT) - 1 :].tolist()
        assert max(abs(a - b) for a, b in zip(expected, choice.member_logprobs[name], strict=True)) < TOLERANCE
        (alone,) = ask(client, fields={"member": name}).choices
        assert alone.token_ids == greedy_tokens(mixture, PROMPT, 8, alpha=alpha)


def test_chat_and_streaming(client, mixture):
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


def test_stop_strings_seeds_and_several_choices(client):
    text = ask(client, max_tokens=16).choices[0].text
    assert ask(client, max_tokens=16, stop=[text[3]]).choices[0].text == text[: text.index(text[3])]
    sampled = [
        [choice.token_ids for choice in ask(client, fields={"alpha": 0.5}, temperature=1, n=3, seed=7).choices]
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]
    assert len(set(map(tuple, sampled[0]))) > 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, but this server takes 0.0 to 1.0"),
        ({"alpha": 0.5, "weights": [0.5, 0.5]}, "pass one of alpha, weights, not 2"),
        ({"weights": [0.2, 0.3, 0.5]}, "2 members"),
        ({"member": "teacher"}, "there is no member 'teacher'; the members are policy, anchor_0"),
        ({"alpha": None, "weights": "half"}, "weights is 'half', but must be a list of numbers"),
    ],
)
def test_bad_fields_are_answered_by_400(client, fields, sentence):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, fields=fields)
    assert sentence in caught.value.message


def test_a_prompt_longer_than_the_context_and_another_models_name(client):
    with pytest.raises(openai.BadRequestError, match="128"):
        ask(client, [5] * 200)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt=PROMPT)


def test_a_cancelled_request_and_a_killed_server_leave_nothing_behind(server, client, mixture):
    expected = greedy_tokens(mixture, PROMPT, 8)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model="mixture", prompt=PROMPT, max_tokens=110, n=8, extra_body={"ignore_eos": True, "alpha": 0.9}
        )
    assert ask(client).choices[0].token_ids == expected
    before = {path.name: path.read_bytes() for path in server.folder.iterdir()}
    with ThreadPoolExecutor(8) as pool:
        under_load = [pool.submit(ask, client, max_tokens=110, fields={"alpha": 0.9}) for _ in range(8)]
        time.sleep(0.1)
        server.kill()
        assert any(future.exception() is not None for future in under_load)
    server.start()
    assert ask(client).choices[0].token_ids == expected
    assert {path.name: path.read_bytes() for path in server.folder.iterdir()} == before
