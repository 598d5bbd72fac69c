"""What the two servers take of the saved presets: the rows of the table in docs/family.md."""

from importlib.util import find_spec

import pytest

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.presets import contrastive_decoding, dexperts, ensemble, guidance, proxy_tuning
from tests.helpers.engines import (
    PROMPTS,
    TOLERANCE,
    engine,
    generate,
    greedy_params,
    greedy_tokens,
    log_prob_difference,
)
from tests.helpers.members import character_tokenizer
from tests.helpers.vllm_members import build_member

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-serving` has it")
PROMPT = "ab12="
PRESETS = {
    "dexperts": lambda a, b, c: dexperts(a, b, c, alpha=0.8),
    "proxy_tuning": lambda a, b, c: proxy_tuning(a, b, c),
    "contrastive_decoding": lambda a, b, c: contrastive_decoding(a, b, plausibility=0.3),
    "guidance": lambda a, b, c: guidance(a, [5, 6, 7, 9], 2.0),
    "product": lambda a, b, c: ensemble([a, b], [1, 1]),
    "pool": lambda a, b, c: ensemble([a, b, c], [0.5, 0.2, 0.3], "prob"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each saved preset."""
    root = tmp_path_factory.mktemp("presets")
    for name, build in PRESETS.items():
        members = [build_member(architecture, seed) for seed, architecture in enumerate(("qwen2", "llama", "qwen2"))]
        model = build(*members)
        model.tokenizer = character_tokenizer()
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", PRESETS)
def test_the_server_without_vllm_serves_each_preset_and_its_members(folders, name):
    testclient = pytest.importorskip("fastapi.testclient", reason="needs pip install 'logitmix[serve]'")
    from logitmix.serving.without_vllm import build_app

    mixture = LogitMixForCausalLM.from_pretrained(folders / name).eval()
    ids, end = mixture.tokenizer(PROMPT)["input_ids"], {"eos_token_id": mixture.tokenizer.eos_token_id}
    last = mixture.config.members[-1]
    alone = [float(member == last) for member in mixture.config.members]
    expected = [greedy_tokens(mixture, ids, 8, **end), greedy_tokens(mixture, ids, 8, weights=alone, **end)]
    request = {"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    with testclient.TestClient(build_app(mixture, mixture.tokenizer, name)) as http:
        answers = [http.post("/v1/completions", json=request | more).json() for more in ({}, {"member": last})]
    texts = [mixture.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert [answer["choices"][0]["text"] for answer in answers] == texts


def test_without_vllm_a_completion_is_as_long_as_the_longest_prompt_leaves_room_for():
    testclient = pytest.importorskip("fastapi.testclient", reason="needs pip install 'logitmix[serve]'")
    from logitmix.serving.without_vllm import build_app

    tokenizer, model = character_tokenizer(), guidance(build_member("qwen2"), [5] * 120, 2.0).eval()
    request = {"model": "guided", "prompt": PROMPT, "temperature": 0}
    with testclient.TestClient(build_app(model, tokenizer, "guided")) as http:
        answer = http.post("/v1/completions", json=request).json()
    assert 0 < len(tokenizer(answer["choices"][0]["text"])["input_ids"]) <= 128 - 120


@needs_vllm
@pytest.mark.parametrize("name", PRESETS)
def test_vllm_takes_each_preset_but_guidance(folders, name):
    from logitmix.serving.config import validate_members

    config = LogitMixConfig.from_pretrained(folders / name)
    if name != "guidance":
        validate_members(config)
        return
    with pytest.raises(ValueError, match="vLLM gives all members the same tokens, but the mixture has a prompt"):
        validate_members(config)


@needs_vllm
@pytest.mark.parametrize("name", ["dexperts", "proxy_tuning", "pool", "contrastive_decoding", "product"])
def test_alternating_decoding_in_vllm_takes_presets_of_two_members(folders, name):
    from vllm import EngineArgs

    from logitmix.serving.alternating import alternating_decoding

    arguments = EngineArgs(model=str(folders / name), enforce_eager=True, **alternating_decoding())
    if name in ("contrastive_decoding", "product"):
        arguments.create_engine_config()
        return
    with pytest.raises(ValueError, match="alternating decoding does not run with 3 members, but with two"):
        arguments.create_engine_config()


@needs_vllm
@pytest.mark.runners
def test_dexperts_in_vllm_writes_what_transformers_writes(folders):
    """Of three members, one subtracts; the weights are the checkpoint's."""
    mixture = LogitMixForCausalLM.from_pretrained(folders / "dexperts").eval()
    with engine(folders / "dexperts") as llm:
        outputs = generate(llm, PROMPTS, greedy_params())
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == greedy_tokens(mixture, prompt, 12)
        assert log_prob_difference(mixture, prompt, output) < 4 * TOLERANCE  # the weights sum to 2.6 in magnitude
