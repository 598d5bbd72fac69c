"""The mixture in vLLM: the tokens and log-probabilities of transformers' mixture."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from vllm.exceptions import VLLMValidationError

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.engines import (
    ALPHAS,
    PROMPTS,
    TOLERANCE,
    assert_same,
    difference,
    engine,
    generate,
    greedy,
    greedy_tokens,
    mixture_of,
    save_adapter,
    save_member,
    token_log_probs,
)

PAIRS = [
    ("qwen2", "llama"),
    ("qwen3", "gemma2"),  # soft-capped logits, sliding and full attention
    ("mistral", "gpt2"),  # one sliding window of two members; absolute positions
    ("gptj", "qwen3_moe"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs(tmp_path, pair):
    """With a chunk of 16 tokens, prefills are cut; requests of different alpha share batches."""
    mixture = mixture_of(*pair, alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=16) as llm:
        assert_same(mixture, llm)
        assert_same(mixture, llm, prompt_logprobs=0)


@pytest.mark.parametrize("pair", [("gpt_neox", "qwen2"), ("qwen2", "phi")], ids="+".join)
def test_architectures_that_vllm_takes_from_transformers(tmp_path, pair):
    """It replaces methods of their classes, after which they no longer run outside of it: so the reference first."""
    mixture = mixture_of(*pair, alpha=0.4)
    mixture.save_pretrained(tmp_path)
    weights = [{} if alpha is None else {"alpha": alpha} for alpha in ALPHAS]
    asked = list(zip(PROMPTS, weights, strict=True))
    tokens = [greedy_tokens(mixture, prompt, 12, **given) for prompt, given in asked]
    scores = [
        token_log_probs(mixture, prompt + ids, **given) for (prompt, given), ids in zip(asked, tokens, strict=True)
    ]
    with engine(tmp_path, max_num_batched_tokens=16) as llm:
        outputs = generate(llm, PROMPTS, [greedy(given or None) for given in weights])
    for output, ids, score in zip(outputs, tokens, scores, strict=True):
        (choice,) = output.outputs
        assert list(choice.token_ids) == ids
        theirs = torch.tensor([position[token].logprob for position, token in zip(choice.logprobs, ids, strict=True)])
        assert (score[-12:] - theirs).abs().max() < TOLERANCE


def test_three_members_in_probabilities(tmp_path):
    mixture = mixture_of("qwen2", "llama", "qwen2", weights=[0.5, 0.2, 0.3], scheme="prob")
    mixture.save_pretrained(tmp_path)
    asked = [{}, {"weights": [0.0, 0.0, 1.0]}, {"weights": [0.1, 0.6, 0.3]}, {"weights": [1.0, 0.0, 0.0]}]
    with engine(tmp_path) as llm:
        assert_same(mixture, llm, asked=asked, prompt_logprobs=0)
        outside = greedy({"weights": [1.5, -0.5, 0.0]})
        with pytest.raises(VLLMValidationError, match="prob"):
            generate(llm, PROMPTS[:1], outside)
        with pytest.raises(VLLMValidationError, match="3 members"):
            generate(llm, PROMPTS[:1], greedy({"weights": [0.5, 0.5]}))


def test_the_same_prompt_again_and_with_another_alpha_takes_its_cached_prefix(tmp_path):
    mixture = mixture_of("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    prompt = (PROMPTS[2] * 3)[:50]
    with engine(tmp_path, block_size=32) as llm:
        for alpha in (None, 0.9, -0.5, 1.4, None):
            assert_same(mixture, llm, [prompt], [{} if alpha is None else {"alpha": alpha}])
        (output,) = generate(llm, [prompt], greedy())
        assert output.num_cached_tokens == 32


def test_samples_are_of_the_mixture_that_the_log_probs_say(tmp_path):
    mixture = mixture_of("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, logprobs_mode="processed_logprobs", max_num_seqs=16) as llm:
        (output,) = generate(llm, PROMPTS[:1], greedy({"alpha": 0.7}, n=16, temperature=0.8, max_tokens=6))
    assert len(output.outputs) == 16
    assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
    for choice in output.outputs:
        ids = PROMPTS[0] + list(choice.token_ids)
        with torch.no_grad():
            logits = mixture(input_ids=torch.tensor([ids]), alpha=0.7).logits[0] / 0.8
        expected = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
        for row, token, theirs in zip(expected, choice.token_ids, choice.logprobs, strict=True):
            assert abs(row[token].item() - theirs[token].logprob) < TOLERANCE


def test_one_member_alone(tmp_path):
    mixture = mixture_of("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
            (output,) = generate(llm, PROMPTS[:1], greedy({"member": name}))
            assert difference(mixture, PROMPTS[0], output, alpha=alpha) < TOLERANCE
        with pytest.raises(VLLMValidationError, match=r"'teacher'.*policy, anchor_0"):
            generate(llm, PROMPTS[:1], greedy({"member": "teacher"}))


@pytest.mark.parametrize("kind", ["full anchor", "two adapters", "base anchor"])
def test_adapters(tmp_path, kind):
    """Members on one base run in one pass over its weights."""
    base = save_member(tmp_path / "base")
    policy = save_adapter(tmp_path / "policy", base, 1, target_modules="all-linear")
    anchor = {
        "full anchor": lambda: save_member(tmp_path / "sft", "llama", 1),
        "two adapters": lambda: save_adapter(tmp_path / "anchor", base, 2, r=6, use_rslora=True),
        "base anchor": lambda: base,
    }[kind]()
    mixture = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4, dtype="float32")
    mixture.save_pretrained(tmp_path / "mixture")
    with engine(tmp_path / "mixture", max_num_batched_tokens=16) as llm:
        assert_same(mixture, llm)
        assert_same(mixture, llm, prompt_logprobs=0)


def test_a_head_with_a_bias_is_not_taken_for_a_product(tmp_path):
    """With weights that do not sum to 1, the bias would count once instead of as often as they sum to."""
    base = save_member(tmp_path / "base", "gptj")
    policy = save_adapter(tmp_path / "policy", base, 1, target_modules=["fc_in", "fc_out"])
    mixture = LogitMixForCausalLM.from_members(policy, base, alpha=0.4, dtype="float32")
    assert mixture.policy.get_output_embeddings().bias is not None
    mixture.save_pretrained(tmp_path / "mixture")
    asked = [{}, {"weights": [0.9, 0.8]}, {"weights": [0.3, 0.2]}, {"alpha": 0.3}]
    with engine(tmp_path / "mixture") as llm:
        assert_same(mixture, llm, asked=asked)


def test_compiled_members_of_one_configuration_and_of_different_ones(tmp_path, monkeypatch):
    """Two of the members are equal but for their weights, the third is not: none takes another's compiled graph."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    mixture = mixture_of("qwen2", "qwen2", "llama", weights=[0.5, 0.2, 0.3])
    mixture.save_pretrained(tmp_path / "mixture")
    asked = [{}, {"weights": [0.0, 0.0, 1.0]}, {"weights": [0.1, 0.6, 0.3]}, {"weights": [1.0, 0.0, 0.0]}]
    with engine(tmp_path / "mixture", enforce_eager=False) as llm:
        assert_same(mixture, llm, asked=asked)
