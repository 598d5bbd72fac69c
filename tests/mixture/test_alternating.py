"""Alternating decoding: greedy completions against joint decoding, the passes it takes, what it refuses."""

import pytest
import torch
from peft import LoraConfig

from logitmix.mixture.alternating import alternating_completions
from logitmix.mixture.generation import GREEDY, generate_completions, get_eos_token_ids
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.architectures import tiny_causal_model
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


def joint(model, prompts=PROMPTS, alphas=0.4, **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings
    return generate_completions(model, character_tokenizer(), prompts, settings, alpha=alphas)


def alternating(model, prompts=PROMPTS, alphas=0.4, **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS} | settings
    ends = get_eos_token_ids(model, character_tokenizer())
    return alternating_completions(model, prompts, settings, ends, alphas)


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


def test_generate_completions_decodes_alternating_on_request():
    model = mixture("qwen2", "llama")
    arguments = (model, character_tokenizer(), PROMPTS, {"do_sample": True, "max_new_tokens": NEW_TOKENS})
    torch.manual_seed(0)
    found = generate_completions(*arguments, decoding="alternating", alpha=0.4)
    torch.manual_seed(0)
    assert found == alternating(model, do_sample=True).token_ids
    torch.manual_seed(0)
    assert found != generate_completions(*arguments, alpha=0.4)  # the same distribution, other random numbers


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"stop_strings": "ab"}, "no stop strings, got 'ab'"), ({"weights": [0.5, 0.5]}, "takes alpha, not 'weights'")],
)
def test_generate_completions_refuses_what_alternating_decoding_cannot_do(kwargs, message):
    settings = GREEDY | {"max_new_tokens": 4}
    with pytest.raises(ValueError, match=message):
        generate_completions(
            mixture("qwen2", "llama"), character_tokenizer(), PROMPTS, settings, decoding="alternating", **kwargs
        )
    with pytest.raises(ValueError, match="decoding is 'alternate'; it must be one of 'joint', 'alternating'"):
        generate_completions(mixture("qwen2", "llama"), character_tokenizer(), PROMPTS, settings, decoding="alternate")
    with pytest.raises(ValueError, match="takes a mixture, not a Qwen2ForCausalLM"):
        generate_completions(tiny_member(), character_tokenizer(), PROMPTS, settings, decoding="alternating")


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
