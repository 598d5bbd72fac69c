"""Alternating decoding against joint decoding (greedy) and against enumerated probabilities (sampled)."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from scipy.stats import chi2
from transformers import GenerationConfig

from logitmix.mixture.alternating import alternating_completions
from logitmix.mixture.generation import GREEDY, generate_completions, get_eos_token_ids
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.speculation import SpeculativeSampler
from tests.helpers.architectures import tiny_causal_model
from tests.helpers.members import character_tokenizer, tiny_member

PROMPTS = [[5, 17, 9, 33, 21, 8, 40], [12], [44, 3, 29, 18, 56], [7, 7]]
NEW_TOKENS = 20  # several windows of the sliding members, which have 4 tokens

PAIRS = {
    "Qwen2 with itself at another seed": ("qwen2", "qwen2"),
    "Qwen2 with Llama": ("qwen2", "llama"),
    "sliding windows with full attention": ("qwen2-sliding", "llama"),
    "full attention with sliding windows": ("qwen2", "qwen2-sliding"),
    "soft-capped logits": ("gemma2", "llama"),
    "learned positions": ("gpt2", "qwen2"),
    "a mixture of experts": ("qwen2", "mixtral"),
}


def mixture(*architectures, **kwargs):
    policy, *anchors = [tiny_member(architecture, seed) for seed, architecture in enumerate(architectures)]
    return LogitMixForCausalLM.from_members(policy, anchors, **kwargs)


def joint(model, prompts=PROMPTS, alphas=0.4, **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings
    return generate_completions(model, character_tokenizer(), prompts, settings, alpha=alphas)


def alternating(model, prompts=PROMPTS, alphas=0.4, **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings
    ends = get_eos_token_ids(model, character_tokenizer())
    return alternating_completions(model, prompts, settings, ends, alphas)


def edit_logits(member, edit):
    """The member, whose logits are edited in place at every pass."""

    def hook(module, args, output):
        edit(output.logits)

    member.register_forward_hook(hook)
    return member


# --- greedy: equal to joint decoding --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("architectures", PAIRS.values(), ids=PAIRS.keys())
def test_greedy_tokens_equal_joint_decoding(architectures, scheme):
    model = mixture(*architectures, scheme=scheme)
    alphas = [0.4, 0.0, 1.0, 0.7]
    completions = alternating(model, alphas=alphas)
    assert completions.token_ids == joint(model, alphas=alphas)
    # vacuous if no draft was accepted, or none rejected
    assert 0 < completions.statistics.acceptance < 1


def test_a_batch_equals_its_sequences_alone():
    model = mixture("qwen2-sliding", "gpt2")
    alone = [alternating(model, [prompt]).token_ids[0] for prompt in PROMPTS]
    assert alternating(model).token_ids == alone


def test_weights_of_the_configuration_are_the_default():
    model = mixture("qwen2", "llama", alpha=0.7)
    assert alternating(model, alphas=None).token_ids == joint(model, alphas=0.7)


def test_weights_beyond_0_and_1_are_exact():
    model = mixture("qwen2", "llama")
    assert alternating(model, alphas=-0.5).token_ids == joint(model, alphas=-0.5)


def test_sequences_end_at_different_times_at_any_eos_token():
    model = mixture("qwen2", "llama")
    unended = joint(model)
    model.generation_config.eos_token_id = [unended[0][3], unended[2][9]]
    expected = joint(model)
    assert len({len(ids) for ids in expected}) > 2, "the sequences end together"
    assert alternating(model).token_ids == expected


def test_one_new_token_and_positions_up_to_the_last():
    model = mixture("gpt2", "gpt2")
    assert alternating(model, max_new_tokens=1).token_ids == joint(model, max_new_tokens=1)
    prompts = [[5, 17, 9] * 40, [3, 8]]  # 128 positions
    assert alternating(model, prompts, max_new_tokens=8).token_ids == joint(model, prompts, max_new_tokens=8)


def test_a_member_of_weight_0_is_ignored_even_if_its_logits_are_nan():
    policy = tiny_member("qwen2", 0)
    anchor = edit_logits(tiny_member("llama", 1), lambda z: z.fill_(torch.nan))
    model = LogitMixForCausalLM.from_members(policy, anchor)
    assert alternating(model, alphas=0.0).token_ids == joint(model, alphas=0.0)


# --- sampled: equal to enumerated probabilities ---------------------------------------------------------------

V, LENGTH, EOS, PROMPT = 6, 3, 4, [2, 3, 1]


def small_pair(scheme, edit=None):
    members = [tiny_member("qwen2", 0, vocab_size=V), tiny_member("llama", 1, vocab_size=V)]
    if edit is not None:
        edit_logits(members[1], edit)
    return LogitMixForCausalLM.from_members(*members, scheme=scheme), members


def truncate(probs, top_k=None, top_p=None, min_p=None):
    """By the definitions, in float64, without transformers' warpers. `probs` are `[V]`."""
    if top_k is not None:
        probs = torch.where(probs >= probs.sort(descending=True).values[top_k - 1], probs, 0.0)
        probs = probs / probs.sum()
    if top_p is not None:
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        probs = probs.index_fill(0, order[before >= top_p], 0.0)
        probs = probs / probs.sum()
    if min_p is not None:
        probs = torch.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


@torch.no_grad()
def enumerate_completions(members, alpha, scheme, temperature=1.0, **truncation):
    """The probability of every completion of `PROMPT`, which ends at EOS or after `LENGTH` tokens."""
    probabilities, open_ = {}, {(): 1.0}
    for _ in range(LENGTH):
        ids = torch.tensor([PROMPT + list(completion) for completion in open_])
        logits = [member(ids, use_cache=False).logits[:, -1].double() for member in members]
        mixed = mix_logits(logits, [1 - alpha, alpha], scheme)
        following = {}
        for (completion, probability), z in zip(open_.items(), mixed, strict=True):
            for token, p in enumerate(truncate((z / temperature).softmax(-1), **truncation).tolist()):
                if p > 0:
                    ended = token == EOS or len(completion) + 1 == LENGTH
                    (probabilities if ended else following)[(*completion, token)] = probability * p
        open_ = following
    assert sum(probabilities.values()) == pytest.approx(1)
    return probabilities


def assert_distributed(samples, probabilities):
    """Pearson's chi-square, with the rare completions in one cell; the seeds are fixed, so it never flickers."""
    counts, n = Counter(map(tuple, samples)), len(samples)
    assert set(counts) <= set(probabilities), "a completion of probability 0 was sampled"
    cells = [(counts[key], n * p) for key, p in probabilities.items() if n * p >= 5]
    rest = (n - sum(count for count, _ in cells), n - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert len(cells) > 5, "too few cells to see a difference"
    assert chi2.sf(statistic, len(cells) - 1) > 0.001, (statistic, len(cells) - 1)


SETTINGS = {
    "temperature 1": {},
    "temperature 1.7": {"temperature": 1.7},
    "temperature 0.6": {"temperature": 0.6},
    "top-k": {"top_k": 3, "temperature": 1.5},
    "top-p": {"top_p": 0.8, "temperature": 1.5},
    "min-p": {"min_p": 0.15, "temperature": 1.3},
    "all of them": {"top_k": 5, "top_p": 0.95, "min_p": 0.05, "temperature": 2.0},
}


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_samples_have_the_enumerated_distribution_at_each_sequences_alpha(settings, scheme):
    model, members = small_pair(scheme)
    alphas = [0.3, 0.8]
    samples = alternating_completions(
        model,
        [PROMPT] * 6000,
        {"do_sample": True, "max_new_tokens": LENGTH, "top_k": 0} | settings,
        [EOS],
        alphas=alphas * 3000,
        generator=torch.Generator().manual_seed(0),
    )
    for i, alpha in enumerate(alphas):
        assert_distributed(samples.token_ids[i::2], enumerate_completions(members, alpha, scheme, **settings))
    assert 0.2 < samples.statistics.acceptance < 1


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_samples_are_exact_where_a_member_rules_tokens_out(scheme):
    model, members = small_pair(scheme, edit=lambda z: z.index_fill_(-1, torch.tensor([1, 5]), -torch.inf))
    settings = {"do_sample": True, "max_new_tokens": LENGTH, "top_k": 0, "temperature": 1.5}
    generator = torch.Generator().manual_seed(0)
    samples = alternating_completions(model, [PROMPT] * 4000, settings, [EOS], alphas=0.6, generator=generator)
    assert_distributed(samples.token_ids, enumerate_completions(members, 0.6, scheme, temperature=1.5))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.02}, {"temperature": None, "top_k": None}],
)
def test_distributions_are_those_of_generate(settings):
    member = tiny_member("qwen2", vocab_size=200)
    ids = torch.tensor([[5, 17, 9]])
    config = GenerationConfig(do_sample=True, max_new_tokens=1, **settings)
    output = member.generate(ids, generation_config=config, output_scores=True, return_dict_in_generate=True)
    sampler = SpeculativeSampler({"do_sample": True} | settings)
    with torch.no_grad():
        _, log_q = sampler.draft(member(ids).logits[:, -1])
    torch.testing.assert_close(log_q, output.scores[0].log_softmax(-1))


def test_the_generator_or_torchs_seed_fixes_the_samples():
    model, _ = small_pair("logit")

    def sample(generator=None):
        settings = {"do_sample": True, "max_new_tokens": 8}
        return alternating_completions(model, [PROMPT] * 4, settings, generator=generator).token_ids

    def of_torch(seed):
        torch.manual_seed(seed)
        return sample()

    assert sample(torch.Generator().manual_seed(3)) == sample(torch.Generator().manual_seed(3))
    assert of_torch(3) == of_torch(3) != of_torch(4)


# --- what it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, {"do_sample": True}], ids=["greedy", "sampled"])
def test_identical_members_take_one_pass_a_token_and_one_at_the_start(settings):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("qwen2", 0))
    statistics = alternating(model, **settings).statistics
    assert statistics.acceptance == 1
    assert statistics.passes == statistics.tokens + len(PROMPTS)


def test_members_that_never_agree_with_the_mixture_take_two_passes_a_token():
    def prefers(token):
        def edit(logits):
            logits[..., token] += 200
            logits[..., 12] += 150

        return edit

    members = [edit_logits(tiny_member("qwen2", i), prefers(10 + i)) for i in range(2)]
    model = LogitMixForCausalLM.from_members(*members)
    completions = alternating(model, alphas=0.5)
    assert completions.token_ids == [[12] * NEW_TOKENS] * len(PROMPTS)
    assert completions.statistics.acceptance == 0
    assert completions.statistics.passes == 2 * NEW_TOKENS * len(PROMPTS)


def test_passes_are_two_minus_the_acceptance():
    statistics = alternating(mixture("qwen2", "llama"), max_new_tokens=60).statistics
    assert statistics.tokens == sum(statistics.drafted)
    # one pass at the start, and none after a rejection that ends the completion
    assert statistics.passes_per_token == pytest.approx(2 - statistics.acceptance, abs=1 / 60)


# --- log-probabilities, refusals ------------------------------------------------------------------------------


@torch.no_grad()
def test_log_probs_of_members_are_those_of_each_member_alone():
    members = [tiny_member("qwen2-sliding", 0), tiny_member("llama", 1)]
    model = LogitMixForCausalLM.from_members(*members)
    settings = {"do_sample": True, "temperature": 0.8, "max_new_tokens": NEW_TOKENS}
    completions = alternating_completions(model, PROMPTS, settings, output_member_log_probs=True)
    for prompt, ids, found in zip(PROMPTS, completions.token_ids, completions.member_log_probs, strict=True):
        for k, member in enumerate(members):
            logits = member(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(found)[:, k], expected, rtol=1e-3, atol=1e-4)
    assert alternating(model).member_log_probs == [[], [], [], []]


REFUSED = {
    "three members": (lambda: mixture("qwen2", "qwen2", "llama", weights=[0.4, 0.3, 0.3]), {}, "takes 2 members"),
    "a shared model": (
        lambda: LogitMixForCausalLM.from_members(base := tiny_member(), base, peft_config=LoraConfig(r=2)),
        {},
        "share one model through adapters",
    ),
    "weights that do not sum to 1": (lambda: mixture("qwen2", "llama", weights=[1.0, 1.0]), {}, r"sum to 1, got \[1"),
    "alphas of another batch": (lambda: mixture("qwen2", "llama"), {"alphas": [0.1, 0.2]}, "2 numbers for 4 prompts"),
    "a static cache": (lambda: mixture("qwen2", "llama"), {"cache_implementation": "static"}, "cache_implementation"),
    "beams": (lambda: mixture("qwen2", "llama"), {"num_beams": 2}, "'num_beams'"),
    "no length": (lambda: mixture("qwen2", "llama"), {"max_new_tokens": None}, "max_new_tokens is None"),
    "an empty prompt": (lambda: mixture("qwen2", "llama"), {"prompts": [[5], []], "alphas": None}, "prompt 1 has no"),
    "a recurrent member": (
        lambda: LogitMixForCausalLM.from_members(tiny_member(), tiny_causal_model("lfm2_moe")),
        {},
        "anchor_0, a Lfm2MoeForCausalLM, cannot take back .* holds more than the keys",
    ),
    "positions of slots": (
        lambda: LogitMixForCausalLM.from_members(tiny_causal_model("roformer"), tiny_member()),
        {},
        "policy, a RoFormerForCausalLM, .* takes no position_ids",
    ),
}


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        alternating(build(), **{"alphas": None} | arguments)
