"""Alternating decoding in vLLM changes nothing but the number of passes.

Tiny members cost next to nothing and disagree often, so the engines here are told that a pass costs the same for any
number of tokens: all decoding steps are turns then.

The arithmetic of turns on the second model runner is tested in test_turns_in_slots.py.
"""

from contextlib import contextmanager

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from vllm import EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from logitmix.mixture.decoding.pass_costs import PassCosts
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.alternating import alternating_decoding, decoding_statistics
from logitmix.training.vllm_patches import reload_weights_in_place
from tests.helpers.adapters import save_adapter
from tests.helpers.distributions import assert_chi_square, exact_marginals
from tests.helpers.engines import (
    IS_INTERPRETED,
    PROMPTS,
    SLOW_ON_SECOND_RUNNER,
    TOLERANCE,
    assert_a_session_matches_transformers,
    assert_matches_transformers,
    engine,
    generate,
    greedy_params,
    greedy_tokens,
    model_runner,
    random_prompts,
    scheduler,
    slow_on_second_runner,
)
from tests.helpers.members import character_tokenizer
from tests.helpers.vllm_members import build_member, build_mixture, save_member

SAMPLES, TOKENS = (128, 2) if IS_INTERPRETED else (1024, 3)


@contextmanager
def alternating(folder, always=True, **kwargs):
    settings = {"block_size": 32, "disable_log_stats": False} | alternating_decoding() | kwargs
    with engine(folder, **settings) as llm:
        if always:
            scheduler(llm).costs = PassCosts((1.0, 1.0), fixed_tokens=1e9)
        yield llm


@pytest.fixture(scope="module", params=["logit", pytest.param("prob", marks=pytest.mark.slow)])
def mixture(request):
    return build_mixture("qwen2", "llama", alpha=0.4, scheme=request.param)


@pytest.fixture(scope="module")
def folder(mixture, tmp_path_factory):
    path = tmp_path_factory.mktemp("alternating")
    mixture.save_pretrained(path)
    return path


def near_mixture(noise):
    """A mixture of two members that agree on most tokens, or on all without noise."""
    policy, anchor = build_member("qwen2"), build_member("qwen2")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    mixture = LogitMixForCausalLM.from_members(policy, [anchor], alpha=0.4)
    mixture.tokenizer = character_tokenizer()
    return mixture


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    """A mixture that accepts most drafts, and its folder."""
    path, mixture = tmp_path_factory.mktemp("near"), near_mixture(0.1)
    mixture.save_pretrained(path)
    return mixture, path


def metric(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def add(llm, name, prompt, params):
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def finish(llm):
    """The tokens of the requests that finish."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
    return finished


MASKS = {
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.5},
    "allowed": {"allowed_token_ids": list(range(20, 40))},
    "min_tokens": {"min_tokens": 8, "stop_token_ids": list(range(3, 40)), "ignore_eos": False},
    "bad_words": {"bad_words": ["a", "b", "cd", "e", "f", "g"]},
}


def under_masks(llm, name):
    length = 10 if IS_INTERPRETED else 20
    params = [greedy_params({"alpha": alpha}, max_tokens=length, **MASKS[name]) for alpha in (0.2, 0.5, 0.8)]
    return generate(llm, PROMPTS[:3], params)


class TestInOneEngine:
    """vLLM cannot run two engines in a process, so these tests share theirs."""

    @pytest.fixture(scope="class")
    def expected_under_masks(self, folder):
        with engine(folder) as llm:
            return {name: under_masks(llm, name) for name in MASKS}

    @pytest.fixture(scope="class")
    def llm(self, folder, expected_under_masks):
        with alternating(folder, max_num_batched_tokens=64) as llm:
            yield llm

    @pytest.mark.runners
    def test_greedy_tokens_of_50_prompts_take_turns(self, mixture, llm):
        """Requests start while others decode, and prefills are split into chunks."""
        N = 16 if IS_INTERPRETED else 50
        requests = [{"alpha": i / (N - 1)} if i % 5 else {} for i in range(N)]
        assert_matches_transformers(mixture, llm, random_prompts(N), requests)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)
        for alpha in (0.3,) if IS_INTERPRETED else (0.0, 0.3, 1.0):
            assert_matches_transformers(mixture, llm, PROMPTS[:1], [{"alpha": alpha}], max_tokens=30)
        drafted, accepted = (
            metric(llm, "vllm:spec_decode_num_drafts"),
            metric(llm, "vllm:spec_decode_num_accepted_tokens"),
        )
        assert drafted > accepted > 0
        statistics = decoding_statistics(llm)
        assert (sum(statistics.drafted), sum(statistics.accepted)) == (drafted, accepted)

    @pytest.mark.runners
    def test_greedy_tokens_of_the_other_scheme_take_turns(self, mixture, llm, monkeypatch):
        """The scheme is read in each step, and the KV cache does not depend on it."""
        other = {"logit": "prob", "prob": "logit"}[mixture.config.scheme]
        for config in (mixture.config, model_runner(llm).get_model().config):
            monkeypatch.setattr(config, "scheme", other)
        drafted = metric(llm, "vllm:spec_decode_num_drafts")
        assert_matches_transformers(mixture, llm)
        assert metric(llm, "vllm:spec_decode_num_drafts") > drafted

    @pytest.mark.runners
    def test_each_chunk_of_a_streamed_input_takes_turns_at_its_own_alpha(self, mixture, llm):
        add(llm, "other", PROMPTS[2], greedy_params({"alpha": 0.6}))
        assert_a_session_matches_transformers(mixture, llm)
        finish(llm)

    @pytest.mark.runners
    def test_requests_end_at_the_longest_context(self, mixture, llm):
        """A draft that does not fit is left out, and its token drawn from the mixture."""
        for alpha in (0.2,) if IS_INTERPRETED else (0.2, 0.8):
            (output,) = generate(llm, PROMPTS[2:3], greedy_params({"alpha": alpha}, max_tokens=64))
            tokens = list(output.outputs[0].token_ids)
            assert len(tokens) == 64 - len(PROMPTS[2])
            assert tokens == greedy_tokens(mixture, PROMPTS[2], len(tokens), alpha=alpha)

    @pytest.mark.runners
    def test_a_block_enters_the_prefix_cache_when_both_members_have_written_it(self, mixture, llm):
        """A request for the same prefix arrives at each step of another that decodes over the end of a block."""
        for arrival in range(3, 8, 2) if IS_INTERPRETED else range(1, 14):
            prompt = [arrival + 3, *PROMPTS[2][1:]]
            tokens = prompt + greedy_tokens(mixture, prompt, 8, alpha=0.3)
            expected = greedy_tokens(mixture, tokens, 4, alpha=0.6)
            add(llm, "first", prompt, greedy_params({"alpha": 0.3}))
            for _ in range(arrival):
                llm.llm_engine.step()
            add(llm, "second", tokens, greedy_params({"alpha": 0.6}, max_tokens=4))
            assert finish(llm)["second"] == expected, arrival
            (output,) = generate(llm, [tokens], greedy_params({"alpha": 0.6}, max_tokens=4))
            assert list(output.outputs[0].token_ids) == expected
            assert output.num_cached_tokens == 32

    def test_a_cached_prefix_serves_every_alpha_in_turns(self, mixture, llm):
        prompt = (PROMPTS[2] * 3)[:50]
        for alpha in (0.9, 0.1, 0.4):
            assert_matches_transformers(mixture, llm, [prompt], [{"alpha": alpha}])
        (output,) = generate(llm, [prompt], greedy_params())
        assert output.num_cached_tokens == 32

    @pytest.mark.runners
    @pytest.mark.parametrize(
        "top_k",
        [
            0,
            pytest.param(
                5, marks=pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter fails in vLLM's top-k kernel")
            ),
        ],
    )
    def test_samples_of_turns_have_the_mixtures_distribution(self, mixture, llm, top_k):
        """Among greedy requests, at the request's own alpha."""
        alpha, temperature, prompt = 0.7, 0.8, PROMPTS[0]
        expected = exact_marginals(mixture, prompt, alpha, temperature, **({"top_k": top_k} if top_k else {}))
        params = [
            SamplingParams(
                temperature=temperature if i % 8 else 0.0, top_k=top_k if i % 8 else 0, max_tokens=TOKENS,
                ignore_eos=True, seed=i if i % 2 else None, extra_args={"alpha": alpha},
            )
            for i in range(SAMPLES)
        ]  # fmt: skip
        outputs = generate(llm, [prompt] * SAMPLES, params)
        for position, probabilities in enumerate(expected[:TOKENS]):
            sampled = [o.outputs[0].token_ids[position] for i, o in enumerate(outputs) if i % 8]
            assert_chi_square(sampled, probabilities)
        greedy = greedy_tokens(mixture, prompt, TOKENS, alpha=alpha)
        assert all(list(output.outputs[0].token_ids) == greedy for output in outputs[::8])

    @pytest.mark.runners
    @pytest.mark.parametrize(
        "name",
        [
            "penalties",
            pytest.param("allowed", marks=SLOW_ON_SECOND_RUNNER),
            "min_tokens",
            pytest.param("bad_words", marks=SLOW_ON_SECOND_RUNNER),
        ],
    )
    def test_penalties_and_masks_apply_to_the_mixture(self, expected_under_masks, llm, name):
        for one, other in zip(expected_under_masks[name], under_masks(llm, name), strict=True):
            assert one.outputs[0].token_ids == other.outputs[0].token_ids
            for a, b in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
                assert all(abs(a[token].logprob - b[token].logprob) < TOLERANCE for token in a)

    @pytest.mark.runners
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"structured_outputs": StructuredOutputsParams(regex="a+")}, "structured_outputs"),
            ({"logprob_token_ids": [5, 6]}, "logprob_token_ids"),
            ({"thinking_token_budget": 5}, "thinking_token_budget"),
            ({"min_p": 0.1, "temperature": 1.0}, "min_p"),
            ({"logit_bias": {5: 1.0}}, "logit_bias"),
            ({"extra_args": {"alpha": 0.2, "member": "policy"}}, "only one"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_requests_that_it_does_not_cover_are_rejected(self, llm, settings, message):
        with pytest.raises(VLLMValidationError, match=message):
            generate(llm, PROMPTS[:1], SamplingParams(max_tokens=2, **settings))


def test_samples_of_members_that_agree_have_the_mixtures_distribution(near):
    """Most drafts are accepted, so most tokens are drawn from a member."""
    mixture, folder = near
    expected = exact_marginals(mixture, PROMPTS[0], 0.4, 1.0)
    params = [SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, seed=i) for i in range(SAMPLES)]
    with alternating(folder, max_num_seqs=128) as llm:
        outputs = generate(llm, [PROMPTS[0]] * SAMPLES, params)
        assert decoding_statistics(llm).acceptance > 0.7
    for position, probabilities in enumerate(expected):
        assert_chi_square([output.outputs[0].token_ids[position] for output in outputs], probabilities)


@pytest.mark.parametrize("pair", [("qwen3", "gemma2"), ("mistral", "gpt2")], ids="+".join)
def test_members_with_sliding_windows_take_turns(tmp_path, pair):
    mixture = build_mixture(*pair, alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with alternating(tmp_path, max_num_batched_tokens=16) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        assert sum(decoding_statistics(llm).drafted) > 0


@pytest.mark.slow
def test_compiled_members_take_turns(tmp_path, monkeypatch):
    """Each member has its own compiled graph, so a turn runs one of them; rollouts of training run them by default."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    mixture = near_mixture(0.1)
    mixture.save_pretrained(tmp_path / "mixture")
    with alternating(tmp_path / "mixture", enforce_eager=False) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        assert decoding_statistics(llm).passes_per_token < 2


@pytest.mark.runners
def test_seeds_reproduce_samples_of_n_completions_and_their_log_probs(mixture, folder):
    prompt, fields = PROMPTS[0], {"alpha": 0.7}
    params = SamplingParams(n=4, temperature=0.8, max_tokens=8, ignore_eos=True, seed=3, logprobs=0, extra_args=fields)
    with alternating(folder, logprobs_mode="processed_logprobs") as llm:
        first = generate(llm, [prompt], params)[0].outputs
        generate(llm, PROMPTS[:3], greedy_params(max_tokens=5))
        second = generate(llm, [prompt], params)[0].outputs
        assert sum(decoding_statistics(llm).drafted) > 0
    assert [choice.token_ids for choice in first] == [choice.token_ids for choice in second]
    assert len({tuple(choice.token_ids) for choice in first}) > 1
    for choice in first:
        with torch.no_grad():
            logits = mixture(input_ids=torch.tensor([prompt + list(choice.token_ids)]), **fields).logits[0] / 0.8
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        for row, token, log_probs in zip(expected, choice.token_ids, choice.logprobs, strict=True):
            assert abs(row[token].item() - log_probs[token].logprob) < TOLERANCE


def test_passes_per_token_follow_from_the_acceptance_rate(near):
    """2 - a passes for each token, and identical members accept every draft."""
    _, folder = near
    with alternating(folder, enable_prefix_caching=False) as llm:
        generate(llm, PROMPTS[:1], greedy_params(max_tokens=60))
        statistics = decoding_statistics(llm)
    assert 0.5 < statistics.acceptance < 1
    # both members read the prompt, and the first turn yields no token
    assert statistics.passes_per_token == pytest.approx(2 - statistics.acceptance, abs=0.05)


def test_identical_members_take_one_pass_per_token(tmp_path):
    near_mixture(0.0).save_pretrained(tmp_path)
    with alternating(tmp_path, always=False) as llm:  # on a CPU, turns cost less for one request
        generate(llm, PROMPTS[:1], greedy_params(max_tokens=50))
        statistics = decoding_statistics(llm)
    assert statistics.acceptance == 1.0
    assert sum(statistics.passes) == 2 + 1 + 49


def test_many_requests_and_a_low_acceptance_rate_are_decoded_jointly(mixture, near, folder):
    """After the start, each step of 48 requests is joint; so are most of one whose drafts are rejected."""
    with alternating(near[1], always=False, max_num_seqs=48) as llm:
        generate(llm, PROMPTS[:1] * 48, greedy_params())
        assert decoding_statistics(llm).passes_per_token == 2
    with alternating(folder, always=False) as llm:
        scheduler(llm).costs = PassCosts((1.0, 1.0), fixed_tokens=2.0)  # turns pay above an acceptance rate of a half
        generate(llm, PROMPTS[:1], greedy_params({"alpha": 0.5}, max_tokens=60))
        statistics = decoding_statistics(llm)
        assert sum(statistics.drafted) < 40
        assert statistics.passes_per_token < 2.2


@pytest.mark.runners
def test_preempted_and_aborted_requests(mixture, folder):
    small = {"num_gpu_blocks_override": 6, "enable_prefix_caching": False}
    with alternating(folder, **small) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        assert metric(llm, "vllm:num_preemptions") > 0
        for name, alpha in (("a", 0.9), ("b", 0.1)):
            add(llm, name, PROMPTS[0], greedy_params({"alpha": alpha}))
        for _ in range(4):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["a"])
        add(llm, "a", PROMPTS[1], greedy_params({"alpha": 0.6}))  # another request of the same name
        assert finish(llm) == {
            "a": greedy_tokens(mixture, PROMPTS[1], 12, alpha=0.6),
            "b": greedy_tokens(mixture, PROMPTS[0], 12, alpha=0.1),
        }


@pytest.mark.runners
@slow_on_second_runner
def test_logits_and_cache_of_earlier_weights_are_forgotten(mixture, folder):
    """New weights arrive while a request runs: its next tokens are theirs, and so are those of the next request."""
    mixture, prompt = build_mixture("qwen2", "llama", alpha=0.4, scheme=mixture.config.scheme), (PROMPTS[2] * 2)[:40]
    with alternating(folder) as llm:
        for seed, before in ((5, 3), (6, 4)):
            add(llm, "a", prompt, greedy_params({"alpha": 0.3}))
            first: list[int] = []
            while len(first) < before:
                for output in llm.llm_engine.step():
                    first = list(output.outputs[0].token_ids)
            assert first == greedy_tokens(mixture, prompt, len(first), alpha=0.3)
            policy = build_member("qwen2", seed=seed).state_dict()
            mixture.policy.load_state_dict(policy)
            reload_weights_in_place(llm, ((f"policy.{name}", weight) for name, weight in policy.items()), "policy.")
            rest = greedy_tokens(mixture, prompt + first, 12 - len(first), alpha=0.3)
            assert finish(llm)["a"] == first + rest


def test_other_models_and_configurations_are_rejected(tmp_path, folder):
    base = save_member(tmp_path / "base")
    policy = save_adapter(tmp_path / "policy", base, 1, target_modules="all-linear")
    LogitMixForCausalLM.from_members(policy, base, alpha=0.4).save_pretrained(tmp_path / "adapters")
    weights = [0.5, 0.2, 0.3]
    build_mixture("qwen2", "qwen2", "llama", weights=weights).save_pretrained(tmp_path / "three")
    cases = [
        (tmp_path / "adapters", {}, "adapters of one model"),
        (tmp_path / "three", {}, "3 members"),
        (folder, {"tensor_parallel_size": 2}, "tensor_parallel_size 2"),
        (folder, {"data_parallel_size": 2}, "data_parallel_size 2"),
        (folder, {"async_scheduling": True}, "async_scheduling"),
        (folder, {"compilation_config": {"cudagraph_mode": "FULL"}}, "cudagraph_mode FULL"),
        (folder, {"worker_cls": "auto"}, "worker_cls is not that of alternating decoding"),
        (folder, {"scheduler_cls": None}, "scheduler_cls is not"),
        (folder, {"speculative_config": None}, "speculative_config is not"),
        (folder, {"kv_offloading_size": 1.0}, "kv_offloading_size"),
        (folder, {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer"),
    ]
    for path, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            EngineArgs(str(path), **alternating_decoding() | settings).create_engine_config()


def test_a_plausibility_cut_matches_transformers(tmp_path):
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    mixture.config.set_plausibility(0.4, "anchor")
    mixture.save_pretrained(tmp_path)
    requests = [{}, {"alpha": 0.2}, {"alpha": -0.3}]
    with alternating(tmp_path) as llm:
        assert_matches_transformers(mixture, llm, PROMPTS[:3], requests)
