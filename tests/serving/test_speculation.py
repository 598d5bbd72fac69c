"""Speculative decoding with a mixture as the target changes nothing but the speed.

A mixture's target distribution is exact whatever the draft proposes: greedy tokens are those of transformers, and
samples have the mixture's distribution.
"""

import multiprocessing

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from vllm import EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.vllm_patches import reload_weights_in_place
from tests.helpers.adapters import save_adapter
from tests.helpers.distributions import assert_chi_square, exact_marginals
from tests.helpers.engines import (
    ALPHAS,
    IS_INTERPRETED,
    PROMPTS,
    SLOW_ON_SECOND_RUNNER,
    assert_matches_transformers,
    engine,
    generate,
    greedy_params,
    greedy_tokens,
    model_runner,
    random_prompts,
)
from tests.helpers.members import VOCAB_SIZE, character_tokenizer
from tests.helpers.ngram import check_ngram_drafts
from tests.helpers.vllm_members import build_member, build_mixture, save_member

SAMPLES, TOKENS = (128, 2) if IS_INTERPRETED else (1024, 3)


@pytest.fixture(scope="module")
def mixture():
    return build_mixture("qwen2", "llama", alpha=0.4)


@pytest.fixture(scope="module")
def padded():
    """A mixture whose policy has a padded vocabulary, larger than the mixture's, as models of one family do."""
    policy, anchor = build_member("qwen2", vocab_size=VOCAB_SIZE + 16), build_member("llama", 1)
    mixture = LogitMixForCausalLM.from_members(policy, [anchor], alpha=0.4)
    mixture.tokenizer = character_tokenizer()
    return mixture


@pytest.fixture(scope="module")
def folder(mixture, padded, tmp_path_factory):
    """A folder with two mixtures, the policy of the first, and a stale draft of other weights."""
    path = tmp_path_factory.mktemp("speculation")
    mixture.save_pretrained(path / "mixture")
    padded.save_pretrained(path / "padded")
    save_member(path / "policy", "qwen2", 0)
    save_member(path / "stale", "qwen2", 7)
    return path


def drafts_of(folder, draft, **kwargs):
    """The speculative configuration of a draft model."""
    return {"method": "draft_model", "model": str(folder / draft), "num_speculative_tokens": 2} | kwargs


def metric(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def accepted(llm):
    return metric(llm, "spec_decode_num_accepted_tokens")


@pytest.mark.runners
def test_greedy_tokens_of_50_prompts_at_their_own_alpha_match_transformers(mixture, folder):
    """The mixture drafts for itself. Prefills are split into chunks, and prompts share cached prefixes."""
    N = 16 if IS_INTERPRETED else 50
    prompts = random_prompts(N)
    requests = [{"alpha": i / (N - 1)} if i % 5 else {} for i in range(N)]
    settings = {"max_num_batched_tokens": 48, "disable_log_stats": False}
    with engine(folder / "mixture", speculative_config=drafts_of(folder, "mixture"), **settings) as llm:
        assert_matches_transformers(mixture, llm, prompts, requests)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)
        assert_matches_transformers(mixture, llm, [PROMPTS[2]] * 4, [{"alpha": a or 0.2} for a in ALPHAS])
        assert accepted(llm) > N


@pytest.mark.runners
def test_a_stale_draft_changes_no_greedy_token_and_a_preempted_request_keeps_its_weights(mixture, folder):
    small = {"block_size": 32, "num_gpu_blocks_override": 8, "disable_log_stats": False}
    with engine(folder / "mixture", speculative_config=drafts_of(folder, "stale"), **small) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        (preemptions,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions > 0


@pytest.mark.runners
def test_requests_are_validated_and_aborted_beside_speculation(mixture, folder):
    with engine(folder / "mixture", speculative_config=drafts_of(folder, "policy")) as llm:
        with pytest.raises(VLLMValidationError, match="'teacher'"):
            generate(llm, PROMPTS[:1], greedy_params({"member": "teacher"}))
        for name, alpha in (("a", 0.9), ("b", 0.1)):
            llm.llm_engine.add_request(name, {"prompt_token_ids": PROMPTS[2]}, greedy_params({"alpha": alpha}))
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["a"])
        finished = []
        while llm.llm_engine.has_unfinished_requests():
            finished += [output for output in llm.llm_engine.step() if output.finished]
        (output,) = finished
        assert list(output.outputs[0].token_ids) == greedy_tokens(mixture, PROMPTS[2], 12, alpha=0.1)
        assert_matches_transformers(mixture, llm)


@pytest.mark.runners
@pytest.mark.parametrize(
    ("draft", "how"),
    [("padded", "probabilistic"), pytest.param("stale", "greedy", marks=SLOW_ON_SECOND_RUNNER)],
)
def test_samples_have_the_mixtures_distribution(mixture, padded, folder, draft, how):
    """The first token follows a prefill; the others are drafted and verified, at the request's own alpha."""
    alpha, temperature, prompt = 0.7, 0.8, PROMPTS[0]
    target, name = (padded, "padded") if draft == "padded" else (mixture, "mixture")  # the first drafts for itself
    expected = exact_marginals(target, prompt, alpha, temperature)
    speculative = drafts_of(folder, draft, draft_sample_method=how)
    params = [
        SamplingParams(
            temperature=temperature, max_tokens=TOKENS, ignore_eos=True, seed=i, extra_args={"alpha": alpha}
        )
        for i in range(SAMPLES)
    ]
    settings = {"speculative_config": speculative, "max_num_seqs": 128, "disable_log_stats": False}
    with engine(folder / name, **settings) as llm:
        outputs = generate(llm, [prompt] * len(params), params)
        assert accepted(llm) > 0
    for position, probabilities in enumerate(expected[:TOKENS]):
        assert_chi_square([o.outputs[0].token_ids[position] for o in outputs], probabilities)


@pytest.mark.runners
@pytest.mark.parametrize("how", [pytest.param("greedy", marks=SLOW_ON_SECOND_RUNNER), "probabilistic"])
def test_seeds_reproduce_samples_of_n_completions(folder, how):
    """All randomness is the request's own, also that of its drafts."""
    speculative = drafts_of(folder, "policy", draft_sample_method=how)
    params = SamplingParams(n=4, temperature=1.0, max_tokens=8, ignore_eos=True, seed=3, extra_args={"alpha": 0.7})
    with engine(folder / "mixture", speculative_config=speculative) as llm:
        first, second = (
            [choice.token_ids for choice in generate(llm, PROMPTS[:1], params)[0].outputs] for _ in range(2)
        )
    assert first == second
    assert len(set(map(tuple, first))) > 1


def acceptance_of(llm, fields):
    """The share of accepted drafts of new greedy requests of these weights."""
    names = "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens"
    before = [metric(llm, name) for name in names]
    generate(llm, PROMPTS, greedy_params(fields, max_tokens=13))
    accepted, drafted = (metric(llm, name) - start for name, start in zip(names, before, strict=True))
    return accepted / drafted


def push_policy(llm, policy):
    weights = ((f"policy.{name}", weight) for name, weight in policy.state_dict().items())
    reload_weights_in_place(llm, weights, "policy.")


@pytest.mark.runners
@pytest.mark.parametrize("draft", ["mixture", pytest.param("policy", marks=SLOW_ON_SECOND_RUNNER)])
def test_greedy_tokens_and_acceptance_of_the_policys_drafts_after_a_push_of_its_weights(folder, draft):
    """A mixture drafts for itself with its policy's own weights. A draft that was loaded beside it becomes stale."""
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    settings = {"speculative_config": drafts_of(folder, draft), "disable_log_stats": False}
    with engine(folder / "mixture", **settings) as llm:
        assert_matches_transformers(mixture, llm)
        assert acceptance_of(llm, {"member": "policy"}) == 1
        mixture.policy.load_state_dict(build_member("qwen2", seed=7).state_dict())
        push_policy(llm, mixture.policy)
        assert_matches_transformers(mixture, llm)
        after = acceptance_of(llm, {"member": "policy"})
        assert after == 1 if draft == "mixture" else after < 0.5


@pytest.mark.runners
@pytest.mark.parametrize(
    ("member", "fields"),
    [pytest.param("policy", {}, marks=SLOW_ON_SECOND_RUNNER), ("anchor_0", {"draft_member": "anchor"})],
)
def test_a_member_that_drafts_for_its_mixture_has_no_weights_or_cache_of_its_own(mixture, folder, member, fields):
    """The policy, or the member that the configuration names. Alone it accepts all of its drafts."""
    settings = {"speculative_config": drafts_of(folder, "mixture"), "hf_overrides": fields, "disable_log_stats": False}
    with engine(folder / "mixture", **settings) as llm:
        runner = model_runner(llm)
        cached = [name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names]
        of_mixture = [m.layer_name for m in runner.get_model().modules() if isinstance(m, Attention)]
        assert sorted(cached) == sorted(of_mixture)
        draft = (runner.drafter if hasattr(runner, "drafter") else runner.speculator).model.draft[0]
        own = getattr(runner.get_model(), member)
        weights, drafts = dict(own.named_parameters()), dict(draft.named_parameters())
        assert drafts.keys() == weights.keys()
        assert all(drafts[name] is weights[name] for name in weights)
        assert draft.model is not own.model  # so that it is compiled with buffers of its own
        assert_matches_transformers(mixture, llm)
        assert acceptance_of(llm, {"member": member}) == 1


def test_a_draft_member_that_does_not_exist_or_does_not_draft_is_rejected(folder):
    for fields, draft, message in (
        ("teacher", "mixture", "there is no member 'teacher'; the members are policy, anchor_0"),
        ("anchor", "policy", "draft_member is 'anchor', but the draft model is not the mixture; set it to"),
        ("anchor", None, "draft_member is 'anchor', but the draft model is not the mixture; set it to"),
    ):
        speculative = None if draft is None else drafts_of(folder, draft)
        arguments = {"hf_overrides": {"draft_member": fields}, "speculative_config": speculative}
        with pytest.raises(ValueError, match=message):
            EngineArgs(str(folder / "mixture"), **arguments).create_engine_config()


def test_a_draft_of_another_vocabulary_is_rejected(folder):
    build_member("qwen2", vocab_size=VOCAB_SIZE + 16).save_pretrained(folder / "larger")
    with pytest.raises(ValueError, match="should have the same vocabulary size"):
        EngineArgs(str(folder / "mixture"), speculative_config=drafts_of(folder, "larger")).create_engine_config()


def test_a_member_outside_the_first_group_of_the_kv_cache_does_not_draft_on_the_first_runner(tmp_path, monkeypatch):
    """vLLM would give its layers the block table of the first group."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    build_mixture("qwen2", "mistral", alpha=0.4).save_pretrained(tmp_path / "mixture")
    settings = {"speculative_config": drafts_of(tmp_path, "mixture"), "hf_overrides": {"draft_member": "anchor"}}
    message = "or not in the first, where vLLM's first model runner expects them; set draft_member to another member"
    with pytest.raises(ValueError, match=message), engine(tmp_path / "mixture", **settings):
        pass


@pytest.mark.slow
def test_a_compiled_mixture_drafts_for_itself(mixture, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    settings = {"speculative_config": drafts_of(folder, "mixture"), "enforce_eager": False}
    with engine(folder / "mixture", disable_log_stats=False, **settings) as llm:
        assert_matches_transformers(mixture, llm)
        assert acceptance_of(llm, {"member": "policy"}) == 1


@pytest.mark.runners
def test_adapters_of_one_model_cannot_draft_for_themselves(tmp_path):
    base = save_member(tmp_path / "base")
    policy = save_adapter(tmp_path / "policy", base, 1)
    LogitMixForCausalLM.from_members(policy, base, alpha=0.4).save_pretrained(tmp_path / "mixture")
    message = "policy runs in one pass with anchor_0; name the folder of another draft"
    speculative = drafts_of(tmp_path, "mixture")
    with pytest.raises(ValueError, match=message), engine(tmp_path / "mixture", speculative_config=speculative):
        pass


@pytest.mark.runners
@pytest.mark.slow
def test_adapters_with_ngram_drafts_match_transformers(tmp_path):
    """In a process of its own: on a CPU, vLLM cannot build another engine once it has imported numba for ngram."""
    process = multiprocessing.get_context("spawn").Process(target=check_ngram_drafts, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_suffix_drafts_match_transformers(mixture, folder):
    """Suffix trees of earlier requests draft; vLLM has them on its first runner only."""
    pytest.importorskip("arctic_inference", reason="vLLM's suffix decoding needs the package arctic-inference")
    suffix = {"method": "suffix", "num_speculative_tokens": 4}
    with engine(folder / "mixture", speculative_config=suffix, disable_log_stats=False) as llm:
        for _ in range(2):
            assert_matches_transformers(mixture, llm, [ids * 3 for ids in ([5, 6, 7], [9, 10], [11, 12, 13], [8])])
        assert accepted(llm) > 0
