"""Alternating decoding: greedy completions against joint decoding, and the passes it takes."""

import pytest
import torch

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import character_tokenizer, edit_logits, tiny_member

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


def joint(model, prompts=PROMPTS, alpha=0.4, stop_strings=(), **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings
    return generate_completions(model, character_tokenizer(), prompts, settings, stop_strings, alpha=alpha)


def alternating(model, prompts=PROMPTS, alpha=0.4, stop_strings=(), decoding="alternating", **settings):
    """The completions and the statistics."""
    settings, statistics = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings, DecodingStatistics()
    completions = generate_completions(
        model, character_tokenizer(), prompts, settings, stop_strings, decoding, statistics, alpha=alpha
    )
    return completions, statistics


# --- greedy: equal to joint decoding --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("architectures", PAIRS.values(), ids=PAIRS.keys())
def test_greedy_tokens_equal_joint_decoding(architectures, scheme):
    model = mixture(*architectures, scheme=scheme)
    alpha = [0.4, 0.0, 1.0, 0.7]
    completions, statistics = alternating(model, alpha=alpha)
    assert completions == joint(model, alpha=alpha)
    # vacuous if no draft was accepted, or none rejected
    assert 0 < statistics.acceptance < 1


def test_a_batch_equals_its_sequences_alone():
    model = mixture("qwen2-sliding", "gpt2")
    alone = [alternating(model, [prompt])[0][0] for prompt in PROMPTS]
    assert alternating(model)[0] == alone


@pytest.mark.parametrize("alpha", [None, -0.5, 1.5])
def test_any_alpha_is_exact(alpha):
    model = mixture("qwen2", "llama", alpha=0.7)
    assert alternating(model, alpha=alpha)[0] == joint(model, alpha=alpha)


def test_sequences_end_at_different_times_at_any_eos_token():
    model = mixture("qwen2", "llama")
    unended = joint(model)
    model.generation_config.eos_token_id = [unended[0][3], unended[2][9]]
    expected = joint(model)
    assert len({len(ids) for ids in expected}) > 2, "the sequences end together"
    assert alternating(model)[0] == expected


def test_sequences_end_at_stop_strings():
    model, tokenizer = mixture("qwen2", "llama"), character_tokenizer()
    unended = joint(model)
    stops = [tokenizer.decode(unended[0][4:6]), tokenizer.decode(unended[2][9])]
    expected = joint(model, stop_strings=stops)
    assert len({len(ids) for ids in expected}) > 2, "the sequences end together"
    assert alternating(model, stop_strings=stops)[0] == expected


PROCESSED = {
    "a repetition penalty": {"repetition_penalty": 1.8},
    "no n-gram twice": {"no_repeat_ngram_size": 2},
    "a least length": {"min_new_tokens": 9},
    "tokens suppressed at the start": {"begin_suppress_tokens": [3, 12, 31]},
    "tokens suppressed": {"suppress_tokens": [3, 12, 31]},
    "words forbidden": {"bad_words_ids": [[3], [12, 31]]},
    "EOS forced at the end": {"forced_eos_token_id": 5},
    "all of them": {"repetition_penalty": 1.3, "min_new_tokens": 4, "suppress_tokens": [3], "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("settings", PROCESSED.values(), ids=PROCESSED.keys())
def test_processors_of_generate_see_each_sequences_own_tokens(settings):
    model = mixture("qwen2", "llama")
    model.generation_config.eos_token_id = [joint(model)[0][3]]
    completions, statistics = alternating(model, **settings)
    assert completions == joint(model, **settings)
    assert 0 < statistics.acceptance < 1


def test_one_new_token_and_positions_up_to_the_last():
    model = mixture("gpt2", "gpt2")
    assert alternating(model, max_new_tokens=1)[0] == joint(model, max_new_tokens=1)
    prompts = [[5, 17, 9] * 40, [3, 8]]  # 128 positions
    assert alternating(model, prompts, max_new_tokens=8)[0] == joint(model, prompts, max_new_tokens=8)


def test_a_member_of_weight_0_is_ignored_even_if_its_logits_are_nan():
    policy = tiny_member("qwen2", 0)
    anchor = edit_logits(tiny_member("llama", 1), lambda z: z.fill_(torch.nan))
    model = LogitMixForCausalLM.from_members(policy, anchor)
    assert alternating(model, alpha=0.0)[0] == joint(model, alpha=0.0)


# --- members of unequal size ----------------------------------------------------------------------------------


def unequal_pair(small="policy"):
    """Members of which one is much smaller, and agrees with the other for once."""
    policy, anchor = tiny_member("qwen2", 0), tiny_member("qwen2", 0, hidden_size=128, num_hidden_layers=6)
    members = (policy, anchor) if small == "policy" else (anchor, policy)
    return LogitMixForCausalLM.from_members(*members)


@pytest.mark.parametrize("small", ["policy", "anchor"])
def test_the_smaller_member_drafts_more_and_the_tokens_are_those_of_joint_decoding(small):
    model = unequal_pair(small)
    completions, statistics = alternating(model, alpha=[0.4, 0.0, 1.0, 0.7])
    assert completions == joint(model, alpha=[0.4, 0.0, 1.0, 0.7])
    passes = statistics.passes if small == "policy" else statistics.passes[::-1]
    assert passes[0] > 1.2 * passes[1]


def test_several_drafts_do_not_go_beyond_the_last_position():
    policy, anchor = tiny_member("gpt2", 0), tiny_member("gpt2", 0, n_inner=4096)
    model = LogitMixForCausalLM.from_members(policy, anchor)
    prompts = [[5, 17, 9] * 40, [3, 8]]  # 128 positions
    assert alternating(model, prompts, max_new_tokens=8)[0] == joint(model, prompts, max_new_tokens=8)


# --- what it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, {"do_sample": True}], ids=["greedy", "sampled"])
def test_identical_members_take_one_pass_a_token_and_one_at_the_start(settings):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("qwen2", 0))
    _, statistics = alternating(model, **settings)
    assert statistics.acceptance == 1
    assert sum(statistics.passes) == statistics.tokens + len(PROMPTS)


def test_members_that_never_agree_with_the_mixture_take_two_passes_a_token():
    def prefers(token):
        def edit(logits):
            logits[..., token] += 200
            logits[..., 12] += 150

        return edit

    members = [edit_logits(tiny_member("qwen2", i), prefers(10 + i)) for i in range(2)]
    completions, statistics = alternating(LogitMixForCausalLM.from_members(*members), alpha=0.5)
    assert completions == [[12] * NEW_TOKENS] * len(PROMPTS)
    assert statistics.acceptance == 0
    assert sum(statistics.passes) == 2 * NEW_TOKENS * len(PROMPTS)


def test_passes_are_two_minus_the_acceptance():
    _, statistics = alternating(mixture("qwen2", "llama"), max_new_tokens=60)
    assert statistics.tokens == sum(statistics.drafted)
    # one pass at the start, and none after a rejection that ends the completion
    assert statistics.passes_per_token == pytest.approx(2 - statistics.acceptance, abs=1 / 60)
