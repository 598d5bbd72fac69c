"""In vLLM the mixture generates the tokens and log-probabilities that it does in transformers."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from peft import LoraConfig
from vllm.exceptions import VLLMValidationError

from logitmix.mixture.frozen.by_reference import save_by_reference
from logitmix.mixture.frozen.references import REFERENCES
from logitmix.mixture.frozen.store import save_store, trained_state_dict
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import save_adapter
from tests.helpers.engines import (
    ALPHAS,
    PROMPTS,
    SLOW_ON_SECOND_RUNNER,
    TOLERANCE,
    assert_a_session_matches_transformers,
    assert_matches_transformers,
    engine,
    generate,
    greedy_params,
    greedy_tokens,
    log_prob_difference,
    slow_on_second_runner,
    token_log_probs,
)
from tests.helpers.vllm_members import build_mixture, save_member

PAIRS = [
    pytest.param(("qwen2", "llama"), marks=SLOW_ON_SECOND_RUNNER),
    ("qwen3", "gemma2"),  # soft-capped logits, sliding and full attention
    # a sliding window in one member; absolute positions in the other
    pytest.param(("mistral", "gpt2"), marks=SLOW_ON_SECOND_RUNNER),
    pytest.param(("gptj", "qwen3_moe"), marks=SLOW_ON_SECOND_RUNNER),
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.runners
def test_pairs_match_transformers(tmp_path, pair):
    """Prefills are split into chunks of 16 tokens, and requests with different alpha share batches."""
    mixture = build_mixture(*pair, alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, max_num_batched_tokens=16) as llm:
        assert_matches_transformers(mixture, llm)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)


@pytest.mark.runners
@slow_on_second_runner
def test_a_plausibility_cut_matches_transformers(tmp_path):
    mixture = build_mixture("qwen2", "llama", weights=[1.5, -0.5])
    mixture.config.set_plausibility(0.4, "anchor")
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert_matches_transformers(mixture, llm)


@pytest.mark.parametrize("kind", ["models", "adapters"])
def test_a_checkpoint_that_refers_to_its_frozen_members_matches_transformers(tmp_path, kind):
    if kind == "adapters":
        base = save_member(tmp_path / "base", "qwen2")
        mixture = LogitMixForCausalLM.from_members(
            base, base, peft_config=LoraConfig(init_lora_weights=False), alpha=0.4
        )
    else:
        mixture = build_mixture("qwen2", "llama", alpha=0.4)
    folder = tmp_path / "run" / "checkpoint-1"
    mixture.save_pretrained(folder, state_dict=trained_state_dict(mixture))
    store = save_store(mixture, tmp_path / "run", tmp_path / "staging")
    (folder / REFERENCES).write_text(json.dumps({"store": store, "sources": {}}))
    with engine(folder) as llm:
        assert_matches_transformers(mixture, llm)


@pytest.mark.parametrize(
    "anchor",
    ["gemma2", "qwen3_moe", pytest.param("adapter", marks=[pytest.mark.runners, *SLOW_ON_SECOND_RUNNER])],
)
def test_members_are_loaded_from_their_own_folders(tmp_path, anchor):
    """With tied weights, with weights that transformers renames and joins, and as an adapter on one base."""
    if anchor == "adapter":
        base = save_member(tmp_path / "base")
        members = [save_adapter(tmp_path / name, base, seed) for seed, name in enumerate(("policy", "anchor"), 1)]
    else:
        members = [save_member(tmp_path / "policy"), save_member(tmp_path / "anchor", anchor, 1)]
    mixture = LogitMixForCausalLM.from_members(*members, alpha=0.4, dtype="float32", attn_implementation="eager")
    save_by_reference(mixture, tmp_path / "mixture", members[0])
    with engine(tmp_path / "mixture") as llm:
        assert_matches_transformers(mixture, llm)


@pytest.mark.parametrize("pair", [("gpt_neox", "qwen2"), ("qwen2", "phi")], ids="+".join)
def test_members_of_vllms_transformers_backend_match_transformers(tmp_path, pair):
    """vLLM replaces methods of their classes, which then fail outside of vLLM, so the reference comes first."""
    mixture = build_mixture(*pair, alpha=0.4)
    mixture.save_pretrained(tmp_path)
    requests = [(p, {} if alpha is None else {"alpha": alpha}) for p, alpha in zip(PROMPTS, ALPHAS, strict=True)]
    tokens = [greedy_tokens(mixture, prompt, 12, **weights) for prompt, weights in requests]
    expected = [
        token_log_probs(mixture, prompt + ids, **weights)[-12:]
        for (prompt, weights), ids in zip(requests, tokens, strict=True)
    ]
    with engine(tmp_path, max_num_batched_tokens=16) as llm:
        outputs = generate(llm, PROMPTS, [greedy_params(weights or None) for _, weights in requests])
    for output, ids, log_probs in zip(outputs, tokens, expected, strict=True):
        (choice,) = output.outputs
        assert list(choice.token_ids) == ids
        in_vllm = torch.tensor([position[token].logprob for position, token in zip(choice.logprobs, ids, strict=True)])
        assert (log_probs - in_vllm).abs().max() < TOLERANCE


@pytest.mark.runners
def test_three_members_with_scheme_prob_match_transformers(tmp_path):
    mixture = build_mixture("qwen2", "llama", "qwen2", weights=[0.5, 0.2, 0.3], scheme="prob")
    mixture.save_pretrained(tmp_path)
    requests = [{}, {"weights": [0.0, 0.0, 1.0]}, {"weights": [0.1, 0.6, 0.3]}, {"weights": [1.0, 0.0, 0.0]}]
    with engine(tmp_path) as llm:
        assert_matches_transformers(mixture, llm, requests=requests, prompt_logprobs=0)
        outside = greedy_params({"weights": [1.5, -0.5, 0.0]})
        with pytest.raises(VLLMValidationError, match="prob"):
            generate(llm, PROMPTS[:1], outside)
        with pytest.raises(VLLMValidationError, match="3 members"):
            generate(llm, PROMPTS[:1], greedy_params({"weights": [0.5, 0.5]}))


class TestInOneEngine:
    """vLLM cannot run two engines in a process, so these tests share theirs."""

    @pytest.fixture(scope="class")
    def mixture(self):
        return build_mixture("qwen2", "llama", alpha=0.4)

    @pytest.fixture(scope="class")
    def llm(self, mixture, tmp_path_factory):
        folder = tmp_path_factory.mktemp("mixture")
        mixture.save_pretrained(folder)
        # the log-probabilities of greedy requests are the same, processed or not
        with engine(folder, block_size=32, logprobs_mode="processed_logprobs", max_num_seqs=16) as llm:
            yield llm

    @pytest.mark.runners
    def test_a_cached_prefix_serves_every_alpha(self, mixture, llm):
        prompt = (PROMPTS[2] * 3)[:50]
        for alpha in (None, 0.9, -0.5, 1.4, None):
            assert_matches_transformers(mixture, llm, [prompt], [{} if alpha is None else {"alpha": alpha}])
        (output,) = generate(llm, [prompt], greedy_params())
        assert output.num_cached_tokens == 32

    @pytest.mark.runners
    def test_samples_and_their_log_probs_have_the_requests_weights_and_temperature(self, mixture, llm):
        (output,) = generate(llm, PROMPTS[:1], greedy_params({"alpha": 0.7}, n=16, temperature=0.8, max_tokens=6))
        assert len(output.outputs) == 16
        assert len({tuple(choice.token_ids) for choice in output.outputs}) > 1
        for choice in output.outputs:
            ids = PROMPTS[0] + list(choice.token_ids)
            with torch.no_grad():
                logits = mixture(input_ids=torch.tensor([ids]), alpha=0.7).logits[0] / 0.8
            expected = logits.log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
            for row, token, log_probs in zip(expected, choice.token_ids, choice.logprobs, strict=True):
                assert abs(row[token].item() - log_probs[token].logprob) < TOLERANCE

    @pytest.mark.runners
    def test_a_request_can_choose_one_member(self, mixture, llm):
        for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
            (output,) = generate(llm, PROMPTS[:1], greedy_params({"member": name}))
            assert log_prob_difference(mixture, PROMPTS[0], output, alpha=alpha) < TOLERANCE
        with pytest.raises(VLLMValidationError, match=r"'teacher'.*policy, anchor_0"):
            generate(llm, PROMPTS[:1], greedy_params({"member": "teacher"}))

    @pytest.mark.runners
    def test_each_chunk_of_a_streamed_input_has_its_own_alpha(self, mixture, llm):
        assert_a_session_matches_transformers(mixture, llm)


@pytest.mark.runners
def test_a_preempted_request_keeps_its_weights(tmp_path):
    """The KV cache holds 160 tokens, so requests are preempted, and recomputed with the tokens that they had."""
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    small = {"block_size": 32, "num_gpu_blocks_override": 6, "enable_prefix_caching": False}
    with engine(tmp_path, disable_log_stats=False, **small) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        (preemptions,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions > 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("full anchor", marks=SLOW_ON_SECOND_RUNNER),
        "two adapters",
        pytest.param("base anchor", marks=SLOW_ON_SECOND_RUNNER),
    ],
)
@pytest.mark.runners
def test_adapters_match_transformers(tmp_path, kind):
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
        assert_matches_transformers(mixture, llm)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)


@pytest.mark.runners
@slow_on_second_runner
def test_members_that_share_a_head_with_a_bias_match_transformers(tmp_path):
    """Mixing their hidden states would be wrong: for weights that do not sum to 1, it would not scale the bias."""
    base = save_member(tmp_path / "base", "gptj")
    policy = save_adapter(tmp_path / "policy", base, 1, target_modules=["fc_in", "fc_out"])
    mixture = LogitMixForCausalLM.from_members(policy, base, alpha=0.4, dtype="float32")
    assert mixture.policy.get_output_embeddings().bias is not None
    mixture.save_pretrained(tmp_path / "mixture")
    requests = [{}, {"weights": [0.9, 0.8]}, {"weights": [0.3, 0.2]}, {"alpha": 0.3}]
    with engine(tmp_path / "mixture") as llm:
        assert_matches_transformers(mixture, llm, requests=requests)


@pytest.mark.slow
@pytest.mark.runners
def test_compiled_members_match_transformers(tmp_path, monkeypatch):
    """Two members share a configuration and the third does not; each needs its own compiled graph."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    mixture = build_mixture("qwen2", "qwen2", "llama", weights=[0.5, 0.2, 0.3])
    mixture.save_pretrained(tmp_path / "mixture")
    requests = [{}, {"weights": [0.0, 0.0, 1.0]}, {"weights": [0.1, 0.6, 0.3]}, {"weights": [1.0, 0.0, 0.0]}]
    with engine(tmp_path / "mixture", enforce_eager=False) as llm:
        assert_matches_transformers(mixture, llm, requests=requests)
