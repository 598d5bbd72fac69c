"""`generate(decoding=…)`: what it returns, when the rule alternates, and what it refuses."""

import pytest
import torch
from peft import LoraConfig
from transformers import DynamicCache, TextIteratorStreamer

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.decoding.loop import validate_decoding
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.architectures import tiny_causal_model
from tests.helpers.members import INPUT, character_tokenizer, tiny_member

SETTINGS = {"do_sample": False, "max_new_tokens": 12}


def mixture(*architectures, **kwargs):
    policy, *anchors = [tiny_member(name, seed) for seed, name in enumerate(architectures or ("qwen2", "llama"))]
    return LogitMixForCausalLM.from_members(policy, anchors, **kwargs)


@pytest.fixture(scope="module")
def model():
    return mixture()


# --- what it returns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", ["joint", "alternating", "auto"])
@pytest.mark.parametrize("given", [{}, {"alpha": 0.3}, {"alpha": [0.0, 0.9]}, {"weights": [1.4, -0.4]}])
def test_greedy_sequences_are_equal(model, decoding, given):
    expected = model.generate(**INPUT, **SETTINGS, **given)
    assert torch.equal(model.generate(**INPUT, **SETTINGS, **given, decoding=decoding), expected)


def test_weights_need_not_sum_to_1(model):
    expected = model.generate(**INPUT, **SETTINGS, weights=[0.7, 0.6])
    assert torch.equal(model.generate(**INPUT, **SETTINGS, weights=[0.7, 0.6], decoding="alternating"), expected)


def test_returned_sequences_each_have_the_weights_of_their_prompt(model):
    arguments = INPUT | {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "alpha": [0.0, 1.0]}
    torch.manual_seed(0)
    output = model.generate(
        **arguments, decoding="alternating", output_member_logprobs=True, return_dict_in_generate=True
    )
    assert output.sequences.shape == (6, INPUT["input_ids"].shape[1] + 8)
    greedy = model.generate(**INPUT, **SETTINGS, alpha=[0.0, 1.0])
    repeated = model.generate(
        **INPUT, **SETTINGS, alpha=[0.0, 1.0], num_return_sequences=1, top_k=1, decoding="alternating"
    )
    assert torch.equal(greedy, repeated)


@torch.no_grad()
@pytest.mark.parametrize(
    ("decoding", "architectures", "weights"),
    [
        ("alternating", ("qwen2-sliding", "llama"), None),
        ("auto", ("qwen2-sliding", "llama"), None),
        ("joint", ("qwen2-sliding", "llama"), None),
        ("joint", ("qwen2", "llama", "gpt2"), [0.5, 0.3, 0.2]),
    ],
)
def test_log_probs_of_members_are_those_of_each_member_alone(decoding, architectures, weights):
    model, ids = mixture(*architectures, weights=weights), INPUT["input_ids"]
    output = model.generate(
        **INPUT, do_sample=True, temperature=0.8, max_new_tokens=9, decoding=decoding, output_member_logprobs=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    P = ids.shape[1]
    assert output.member_logprobs.shape == (len(ids), 9, len(architectures))
    for k, member in enumerate(model.members):
        for row, mask, found in zip(output.sequences, INPUT["attention_mask"], output.member_logprobs, strict=True):
            text = row[mask.argmax() :][None]  # without padding
            logits = member(text, use_cache=False).logits[0, -10:-1]
            expected = logits.log_softmax(-1).gather(-1, row[P:, None]).squeeze(1)
            torch.testing.assert_close(found[:, k], expected, rtol=1e-3, atol=1e-4)


def test_lengths_tell_completions_from_padding(model):
    expected = model.generate(**INPUT, **SETTINGS)
    end = int(expected[0, INPUT["input_ids"].shape[1] + 2])
    arguments = INPUT | SETTINGS | {"eos_token_id": end, "pad_token_id": end, "decoding": "alternating"}
    output = model.generate(**arguments, return_dict_in_generate=True, output_member_logprobs=True)
    assert output.lengths.tolist()[0] == 3
    assert (output.sequences[0, INPUT["input_ids"].shape[1] + 3 :] == end).all()
    assert (output.member_logprobs[0, 3:] == 0).all()


def test_stop_strings_of_generate_itself(model):
    tokenizer, ids = character_tokenizer(), torch.tensor([[5, 17, 9]])
    text = tokenizer.decode(model.generate(ids, **SETTINGS)[0, 3:])
    arguments = SETTINGS | {"stop_strings": [text[3:5]], "tokenizer": tokenizer}
    expected = model.generate(ids, **arguments)
    assert expected.shape[1] < 3 + SETTINGS["max_new_tokens"]
    assert torch.equal(model.generate(ids, **arguments, decoding="alternating"), expected)


def test_a_streamer_gets_every_token_of_a_sequence(model):
    tokenizer = character_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = torch.tensor([[5, 17, 9]])
    output = model.generate(ids, **SETTINGS, streamer=streamer, decoding="alternating")
    assert "".join(streamer) == tokenizer.decode(output[0, 3:])


# --- the rule -------------------------------------------------------------------------------------------------


def statistics_of(model, rows, **arguments):
    ids = torch.tensor([[5, 17, 9]] * rows)
    output = model.generate(ids, **SETTINGS, **arguments, return_dict_in_generate=True)
    return getattr(output, "statistics", None)


def test_auto_alternates_for_few_sequences_and_decodes_many_jointly(model, monkeypatch):
    monkeypatch.setattr("logitmix.mixture.decoding.pass_costs._CPU", (2.0, 0.0))
    assert sum(statistics_of(model, 1, decoding="auto").drafted) > 0
    assert sum(statistics_of(model, 32, decoding="auto").drafted) == 0
    assert statistics_of(model, 32, decoding="auto").passes_per_token == 2


def test_auto_alternates_once_few_sequences_are_left(model, monkeypatch):
    monkeypatch.setattr("logitmix.mixture.decoding.pass_costs._CPU", (2.0, 0.0))
    prompts = [[5, 17, 9], *[[i % 50, 3, i % 7] for i in range(40)]]
    settings = GREEDY | {"max_new_tokens": 30}
    unended = generate_completions(model, character_tokenizer(), prompts, settings)
    model.generation_config.eos_token_id = sorted({ids[0] for ids in unended[1:]} - set(unended[0]))
    expected = generate_completions(model, character_tokenizer(), prompts, settings)
    statistics = DecodingStatistics()
    found = generate_completions(model, character_tokenizer(), prompts, settings, (), "auto", statistics)
    model.generation_config.eos_token_id = None
    assert found == expected
    assert 0 < sum(statistics.drafted) < statistics.tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 4, 5]},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_auto_leaves_to_transformers_what_it_cannot_do_or_costs_one_pass(model, arguments):
    ids = torch.tensor([[5, 17, 9]])
    expected = model.generate(ids, **SETTINGS, **arguments)
    output = model.generate(ids, **SETTINGS, **arguments, decoding="auto", return_dict_in_generate=True)
    assert getattr(output, "statistics", None) is None
    assert torch.equal(output.sequences, expected)


# --- what it refuses ------------------------------------------------------------------------------------------


class OwnCriterion:
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED = {
    "beams": ({"num_beams": 2}, "the generation mode 'beam_search'"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "the generation mode 'assisted_generation'"),
    "a static cache": ({"cache_implementation": "static"}, "a cache of the class StaticCache"),
    "no cache": ({"use_cache": False}, "a cache of the class NoneType"),
    "positions": ({"position_ids": torch.tensor([[3, 4, 5]])}, "position_ids of one's own"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
    "a criterion": ({"stopping_criteria": [OwnCriterion()]}, "a OwnCriterion, which may not work on each sequence"),
    "a processor": ({"guidance_scale": 2.0}, "a UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "prefixes": ({"prefix_allowed_tokens_fn": lambda batch, ids: [3]}, "a PrefixConstrainedLogitsProcessor"),
    "other arguments": ({"labels": torch.tensor([[5, 17, 9]])}, "the argument 'labels'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_it_cannot_honour_are_refused(model, arguments, message):
    ids = torch.tensor([[5, 17, 9]])
    with pytest.raises(ValueError, match=f"^alternating decoding cannot be used with {message}"):
        model.generate(ids, **SETTINGS | arguments, decoding="alternating")
    if "scores" not in message:
        with pytest.raises(ValueError, match=f"^output_member_logprobs cannot be used with {message}"):
            model.generate(ids, **SETTINGS | arguments, output_member_logprobs=True)


def test_a_cache_that_holds_tokens_is_refused(model):
    ids, cache = torch.tensor([[5, 17, 9, 4]]), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be used with a cache that holds tokens; use decoding='joint'"):
        model.generate(ids, **SETTINGS, past_key_values=cache, decoding="alternating")


MODELS = {
    "three members": (lambda: mixture("qwen2", "qwen2", "llama", weights=[0.4, 0.3, 0.3]), "3 members: it takes 2"),
    "a shared model": (
        lambda: LogitMixForCausalLM.from_members(base := tiny_member(), base, peft_config=LoraConfig(r=2)),
        "members that share one model through adapters",
    ),
    "a recurrent member": (
        lambda: LogitMixForCausalLM.from_members(tiny_member(), tiny_causal_model("lfm2_moe")),
        "anchor_0, a Lfm2MoeForCausalLM, whose cache holds more than the keys",
    ),
    "positions of slots": (
        lambda: LogitMixForCausalLM.from_members(tiny_causal_model("roformer"), tiny_member()),
        "policy, a RoFormerForCausalLM, whose forward takes no position_ids",
    ),
    "no mixture": (tiny_member, "a Qwen2ForCausalLM, which is no mixture"),
}


@pytest.mark.parametrize(("build", "message"), MODELS.values(), ids=MODELS.keys())
def test_models_that_it_cannot_decode_are_refused_and_auto_decodes_them_jointly(build, message):
    model, tokenizer = build(), character_tokenizer()
    prompts, settings = [[5, 17, 9], [3]], GREEDY | {"max_new_tokens": 6}
    for refuse in (
        lambda: validate_decoding(model, "alternating"),
        lambda: generate_completions(model, tokenizer, prompts, settings, decoding="alternating"),
    ):
        with pytest.raises(ValueError, match=f"^alternating decoding cannot be used with {message}"):
            refuse()
    expected = generate_completions(model, tokenizer, prompts, settings)
    assert generate_completions(model, tokenizer, prompts, settings, decoding="auto") == expected


def test_log_probs_need_an_output_that_holds_them(model):
    with pytest.raises(ValueError, match="set, but return_dict_in_generate is not; set both"):
        model.generate(**INPUT, **SETTINGS, output_member_logprobs=True)


def test_a_decoding_that_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match="decoding is 'alternate'; it must be one of 'auto', 'joint', 'alternating'"):
        model.generate(**INPUT, **SETTINGS, decoding="alternate")
