"""Classifier-free guidance by name: its equation, its prompt in the configuration, and who refuses that."""

import json

import pytest
import torch
from transformers import GenerationConfig

from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.presets import guidance
from tests.helpers.distill import distiller_of
from tests.helpers.grpo import trainer_of
from tests.helpers.members import INPUT, character_tokenizer, tiny_member

NEGATIVE = [7, 21, 5, 40]
SCALE = 2.5


def guided(negative=NEGATIVE, **kwargs):
    return guidance(tiny_member("gpt2", 2), negative, SCALE, **kwargs).eval()


def uncached(prompt, negative, steps):
    """Greedy tokens of the paper's equation, from log-probabilities of whole texts."""
    member, tokens = tiny_member("gpt2", 2), []
    for _ in range(steps):
        with torch.no_grad():
            on_prompt, on_negative = (
                member(torch.tensor([[*start, *tokens]])).logits[0, -1].float().log_softmax(-1)
                for start in (prompt, negative)
            )
        tokens.append(int((on_negative + SCALE * (on_prompt - on_negative)).argmax()))
    return tokens


def prompts():
    pairs = zip(INPUT["input_ids"], INPUT["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_follows_an_uncached_loop(cache):
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    output = guided().generate(**INPUT, max_new_tokens=6, do_sample=False, **options)
    assert [row[5:].tolist() for row in output] == [uncached(prompt, NEGATIVE, 6) for prompt in prompts()]


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("length", [2, 5, 9])
def test_the_negative_prompt_may_have_any_length(length, has_mask):
    prompt, negative = prompts()[1], [3 + 5 * i for i in range(length)]
    ids = torch.tensor([prompt])
    mask = {"attention_mask": torch.ones_like(ids)} if has_mask else {}
    output = guided(negative).generate(ids, max_new_tokens=5, do_sample=False, **mask)
    assert output[0, len(prompt) :].tolist() == uncached(prompt, negative, 5)


def test_the_saved_mixture_has_its_negative_prompt(tmp_path):
    guided().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in tiny_member("gpt2").parameters())
    completions = generate_completions(
        loaded, character_tokenizer(), prompts(), {"max_new_tokens": 6, "do_sample": False}, decoding="auto"
    )
    assert completions == [uncached(prompt, NEGATIVE, 6) for prompt in prompts()]


def test_a_negative_prompt_may_be_what_a_tokenizer_returns():
    inputs = character_tokenizer()(["abc"], return_tensors="pt")
    assert guided(inputs).config.member_prompts == {"anchor_0": [3, 4, 5]}
    assert guided(inputs["input_ids"][0]).config.member_prompts == {"anchor_0": [3, 4, 5]}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([5], "member_prompts is a list, but must be a dict of prompts by the names of members: policy, anchor_0"),
        ({"anchor": "abc"}, "the prompt of anchor_0 is 'abc', but one to save is a list of token ids"),
        (
            {"anchor": [[5], [6]]},
            r"the prompt of anchor_0 is \[\[5\], \[6\]\], but one to save is a list of token ids",
        ),
        ({"anchor": [5.0]}, "but one to save is a list of token ids"),
        ({"anchor": None}, "the prompt of anchor_0 is None, but one to save is a list of token ids"),
        ({"policy": [5], "anchor": [6]}, "has a prompt for every member, so none would read input_ids"),
        ({"nobody": [5]}, "there is no member 'nobody'"),
    ],
)
def test_a_prompt_that_no_member_could_read_is_not_saved(prompts, message):
    model = guided()
    with pytest.raises(ValueError, match=message):
        model.config.set_member_prompts(prompts)
    assert model.config.member_prompts == {"anchor_0": NEGATIVE}


def test_the_new_tokens_of_max_length_count_in_the_context_of_each_member():
    with pytest.raises(ValueError, match="the prompt of anchor_0 has 126 tokens; with max_new_tokens 5 that exceeds"):
        guided([5] * 126).generate(torch.tensor([[5, 6]]), max_length=7, do_sample=False)


@pytest.mark.parametrize("config", [None, GenerationConfig(max_length=30)], ids=["default", "in generation_config"])
def test_other_limits_on_new_tokens_count_in_the_context_too(config):
    with pytest.raises(ValueError, match=r"of anchor_0 has 120 tokens; with max_new_tokens (20|28) that"):
        guided([5] * 120).generate(torch.tensor([[5, 6]]), generation_config=config)


def test_a_call_may_give_another_negative_prompt():
    prompt, other = prompts()[1], [3, 3, 8]
    output = guided().generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, member_prompts={"anchor": other}
    )
    assert output[0, len(prompt) :].tolist() == uncached(prompt, other, 6)


def test_scores_are_those_of_the_tokens_as_generated():
    model, prompt = guided(), prompts()[1]
    ids = torch.tensor([prompt + uncached(prompt, NEGATIVE, 4)])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        log_probs, _ = model.score(ids, torch.ones_like(ids), labels)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    expected = [z[0].log_softmax(-1).max() for z in out.logits]
    torch.testing.assert_close(log_probs[0, len(prompt) - 1 :], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_without_a_negative_prompt_it_is_bos_and_texts_are_read_by_the_tokenizer(tmp_path):
    assert guided(None).config.member_prompts == {"anchor_0": [1]}
    tokenizer = character_tokenizer()
    text = guided("abc", tokenizer=tokenizer)
    assert text.config.member_prompts == {"anchor_0": tokenizer("abc")["input_ids"]}
    tiny_member("gpt2", 2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert guidance(str(tmp_path), "abc").config.member_prompts == text.config.member_prompts


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: guidance(tiny_member(), NEGATIVE, 0.5), r"scale is 0\.5, but guidance takes a number of at least 1"),
        (lambda: guidance(tiny_member(), NEGATIVE, float("nan")), "scale is nan"),
        (lambda: guidance(tiny_member(), "abc"), "the negative prompt is a text, but the model has no tokenizer"),
        (lambda: guidance(tiny_member(), []), "the prompt of anchor_0 is empty"),
        (lambda: guidance(tiny_member(bos_token_id=None)), "the model has no BOS token"),
        (lambda: guidance(tiny_member(), [5, 61]), "the prompt of anchor_0 has a token id outside 0 to 60"),
        (lambda: guidance(tiny_member(), [5, -1]), "the prompt of anchor_0 has a token id outside 0 to 60"),
        (
            lambda: guidance(tiny_member(), [5] * 128),
            "has 128 tokens, which leaves no room .* the member's context of",
        ),
        (lambda: guidance(tiny_member(), [[5], [6]]), "negative_prompt is 2 prompts, but one is saved"),
        (lambda: guidance(tiny_member(), [1.5]), "the prompt of anchor_0 is a list, but must be a text, token ids"),
        (lambda: guidance(tiny_member(), 5), "the prompt of anchor_0 is a int, but must be a text, token ids"),
    ],
)
def test_what_is_not_guidance_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("use", "who"),
    [
        (lambda model, _: model(**INPUT), "forward without labels"),
        (lambda model, _: FusedScorer(model), "the fused loss head"),
        (lambda model, path: trainer_of(path, model, loss_head="reference"), "training"),
        (lambda model, path: distiller_of(path, model), "distillation"),
    ],
)
def test_what_gives_all_members_one_prompt_refuses_it(tmp_path, use, who):
    with pytest.raises(ValueError, match=rf"{who} gives all members the same tokens, but .* for anchor_0"):
        use(guided(), tmp_path)
