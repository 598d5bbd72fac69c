"""transformers' server of a mixture without vLLM, called by the official client."""

import copy
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers.processors import TemplateProcessing

from tests.helpers.members import character_tokenizer
from tests.helpers.paths import ROOT

pytest.importorskip("fastapi", reason="what serving needs is not installed: pip install 'logitmix[serve]'")
pytest.importorskip("openai", reason="the openai client is not installed: pip install 'logitmix[serve]'")

import httpx
import openai

from tests.helpers.engines import greedy_tokens
from tests.helpers.servers import TransformersServer

PROMPT = "ab12="


@pytest.fixture(scope="module")
def server(folder):
    server = TransformersServer(folder / "mixture", folder / "log.txt")
    yield server
    server.kill()


def complete(client, prompt=PROMPT, fields=None, **kwargs):
    arguments = {"temperature": 0, "max_tokens": 8} | kwargs
    return client.completions.create(model="mixture", prompt=prompt, extra_body=fields, **arguments).choices[0].text


def expected(mixture, prompt=PROMPT, length=8, **weights):
    end = {"eos_token_id": mixture.tokenizer.eos_token_id}
    tokens = greedy_tokens(mixture, mixture.tokenizer(prompt)["input_ids"], length, **end, **weights)
    return mixture.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_log_names_the_server_and_the_model_has_one_name(server, client):
    assert "the server of transformers runs instead" in server.log.read_text()
    assert [model.id for model in client.models.list()] == ["mixture"]
    assert client.completions.create(model="mixture", prompt=PROMPT, max_tokens=1).model == "mixture"
    assert httpx.get(f"{server.url}/metrics").status_code == 404


def test_guidance_is_served_with_its_negative_prompt(mixture):
    from fastapi.testclient import TestClient

    from logitmix.presets import guidance
    from logitmix.serving.without_vllm import build_app

    guided = guidance(copy.deepcopy(mixture.policy), [5, 6, 7], 3.0).eval()
    ids = mixture.tokenizer(PROMPT)["input_ids"]
    tokens = greedy_tokens(guided, ids, 8, eos_token_id=mixture.tokenizer.eos_token_id)
    assert tokens != greedy_tokens(guided.policy, ids, 8, eos_token_id=mixture.tokenizer.eos_token_id)
    request = {"model": "guided", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    with TestClient(build_app(guided, mixture.tokenizer, "guided")) as http:
        answer = http.post("/v1/completions", json=request).json()
    assert answer["choices"][0]["text"] == mixture.tokenizer.decode(tokens, skip_special_tokens=True)


def test_concurrent_requests_each_have_their_own_alpha(client, mixture):
    requests = [(PROMPT * (1 + i % 3), i / 15) for i in range(16)]
    assert len({expected(mixture, *pair[:1], alpha=pair[1]) for pair in requests}) > 3
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: complete(client, pair[0], {"alpha": pair[1]}), requests))
    assert answers == [expected(mixture, prompt, alpha=alpha) for prompt, alpha in requests]


def test_the_example_client_prints_the_answer_at_each_alpha(server, mixture):
    command = [sys.executable, str(ROOT / "examples" / "serving_client.py"), PROMPT, "--url", server.url]
    printed = subprocess.check_output([*command, "--alphas", "0", "0.3", "1", "--max_tokens", "8"], text=True)
    answers = {alpha: expected(mixture, alpha=alpha) for alpha in (0.0, 0.3, 1.0)}
    assert printed.splitlines() == [f"alpha {alpha:g}: {answer!r}" for alpha, answer in answers.items()]


def test_the_servers_alpha_and_a_requests_weights_and_member(client, mixture):
    assert complete(client) == expected(mixture, alpha=0.4)
    assert complete(client, fields={"weights": [0.8, 0.2]}) == expected(mixture, alpha=0.2)
    assert complete(client, fields={"member": "anchor"}) == expected(mixture, alpha=1.0)


def test_chat_with_and_without_streaming(client, mixture):
    request = {"model": "mixture", "messages": [{"role": "user", "content": "ab12"}], "temperature": 0}
    request |= {"max_completion_tokens": 8, "extra_body": {"alpha": 0.7}}
    text = expected(mixture, alpha=0.7)
    assert client.chat.completions.create(**request).choices[0].message.content == text
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    streamed = client.completions.create(
        model="mixture", prompt=PROMPT, temperature=0, max_tokens=8, stream=True, extra_body={"alpha": 0.7}
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_the_responses_api(client, mixture):
    response = client.responses.create(
        model="mixture", input="ab12", temperature=0, max_output_tokens=8, extra_body={"alpha": 0.7}
    )
    assert response.output_text == expected(mixture, alpha=0.7)


def test_requests_sample_from_all_tokens_by_default(client):
    """The vocabulary has 61 tokens, and transformers' default is top_k=50."""
    first, second, again = (complete(client, temperature=1000, max_tokens=110, seed=seed) for seed in (0, 1, 0))
    assert len(set(first + second)) > 50
    assert first == again != second


def test_a_seed_reproduces_samples_among_concurrent_requests(client):
    def sampled(seed):
        return complete(client, temperature=1.5, max_tokens=40, seed=seed)

    alone = [sampled(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sampled, range(8))) == alone


def test_a_completion_ends_where_the_context_does(client):
    assert len(complete(client, "a" * 100, max_tokens=1000, fields={"alpha": 0.0})) <= 28
    with pytest.raises(
        openai.BadRequestError,
        match="the prompt has 200 tokens, which leaves no room for a completion in the members' context of 128",
    ):
        complete(client, "a" * 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": {"alpha": 1.5}}, "alpha is 1.5, but this server takes 0.0 to 1.0"),
        ({"fields": {"member": "teacher"}}, "there is no member 'teacher'; the members are policy, anchor_0"),
        ({"fields": {"member_prompts": {"anchor": "x"}}}, "a request cannot set member_prompts"),
        ({"fields": {"member_logprobs": True}}, "member_logprobs is not supported without vLLM"),
        ({"fields": {"vllm_xargs": ["alpha"]}}, "vllm_xargs is not supported without vLLM"),
        ({"fields": {"vllm_xargs": {"alpha": 0.3}}}, "vllm_xargs is not supported without vLLM"),
        ({"logprobs": 0}, "logprobs is not supported without vLLM"),
        ({"n": 2}, "n is not supported without vLLM"),
        ({"stop": "日本"}, "Stop string"),
        ({"logit_bias": {"5": 100}}, "logit_bias is not supported without vLLM"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported without vLLM"),
        ({"fields": {"weights": [[-5, 6]]}}, "weights is [[-5, 6]], but must be a list of numbers"),
        ({"fields": {"seed": "x"}}, "seed is 'x', but must be an integer"),
        ({"max_tokens": 0}, "must be greater than 0"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
)
def test_invalid_and_unsupported_fields_return_status_400(client, arguments, message):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **arguments)
    assert message in caught.value.message


def test_a_stop_string_ends_the_text_and_stays_in_it(client, mixture):
    text = expected(mixture, alpha=0.4)
    assert complete(client, stop=[text[3]]) == text[: text.index(text[3]) + 1]


def test_fields_without_effect_are_accepted(client, mixture):
    fields = {"member_logprobs": False, "vllm_xargs": None}
    assert complete(client, n=1, user="me", fields=fields) == expected(mixture, alpha=0.4)


@pytest.mark.filterwarnings("ignore:the tokenizer of .* appends")
def test_prompts_are_not_ended_by_the_tokenizer(mixture):
    from logitmix.serving.without_vllm import build_app

    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    build_app(mixture, tokenizer, "mixture")
    assert tokenizer("ab=")["input_ids"] == character_tokenizer()("ab=")["input_ids"]


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}a{% endfor %}",
            "leaves out the",
        ),
    ],
)
def test_messages_that_the_chat_template_does_not_render_return_status_400(mixture, chat_template, message):
    from fastapi.testclient import TestClient

    from logitmix.serving.without_vllm import build_app

    tokenizer = character_tokenizer()
    tokenizer.chat_template = chat_template
    client = TestClient(build_app(mixture, tokenizer, "mixture"), raise_server_exceptions=False)
    for path, field in (("chat/completions", "messages"), ("responses", "input")):
        body = {"model": "mixture", field: [{"role": "user", "content": "a"}]}
        response = client.post(f"/v1/{path}", json=body)
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


def test_an_unknown_model_is_rejected(client):
    with pytest.raises(openai.BadRequestError, match="other"):
        client.completions.create(model="other", prompt=PROMPT)


def test_the_documented_client_prints_the_answer_at_each_alpha(server, mixture, capsys):
    """The code of the page runs unchanged but for the address, the model's name and the prompt."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace("http://localhost:8000", server.url).replace("runs/quickstart/fixed_mixing", "mixture")
    code, prompt = code.replace("=?\\n", "=?"), "7+8-9+4=?"  # the test's tokenizer has no newline
    exec(compile(code, "docs/serving.md", "exec"), {})
    texts = [expected(mixture, prompt, 64, alpha=alpha) for alpha in (0.0, 0.3, 1.0)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{alpha} {text!r}" for alpha, text in zip((0, 0.3, 1), texts, strict=True)]


@pytest.mark.parametrize("decoding", ["joint", "alternating"])
def test_the_server_decodes_as_it_was_told(mixture, decoding):
    from fastapi.testclient import TestClient

    from logitmix.serving.without_vllm import build_app

    app = build_app(mixture, mixture.tokenizer, "mixture", decoding)
    calls = []
    hook = mixture.register_forward_hook(lambda *_: calls.append(1))
    with TestClient(app) as http:
        fields = {"model": "mixture", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "alpha": 0.4}
        answers = [http.post("/v1/completions", json=fields | {"stop": stop}) for stop in (None, ["b"])]
    hook.remove()
    assert answers[0].json()["choices"][0]["text"] == expected(mixture, alpha=0.4)
    assert answers[1].status_code == 200
    # joint decoding calls the mixture's forward, alternating decoding its members'
    assert bool(calls) is (decoding == "joint")
