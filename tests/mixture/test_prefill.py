"""A prompt that is repeated in a batch is read once, and each of its rows decodes as if it were alone."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.prefill import distinct_prompts
from tests.helpers.members import PAD, tiny_member
from tests.mixture.test_generation import PROMPTS, left_padded, reference_generate

GROUPS = [0, 1, 0, 2, 1, 0]  # prompts of a batch in which they are repeated, not side by side
REPEATED = [PROMPTS[i] for i in GROUPS]
ALPHAS = [0.1, 0.3, 0.5, 0.7, 0.9, 0.3]


def build(*architectures, **kwargs):
    members = [tiny_member(architecture, seed=i) for i, architecture in enumerate(architectures)]
    return LogitMixForCausalLM.from_members(members[0], members[1:], **kwargs), members


def rows_read(model):
    """How many rows each pass of the policy reads, filled while the model runs."""
    rows = []

    def record(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))

    model.policy.register_forward_pre_hook(record, with_kwargs=True)
    return rows


@pytest.mark.parametrize("decoding", ["joint", "alternating"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("architectures", [("qwen2", "llama"), ("qwen2-sliding", "gemma2"), ("gpt2", "mixtral")])
def test_repeated_prompts_decode_as_if_alone_and_are_read_once(architectures, scheme, decoding):
    model, members = build(*architectures, scheme=scheme)
    weights = [[1 - alpha, alpha] for alpha in ALPHAS]
    expected = reference_generate(members, weights, REPEATED, scheme, new_tokens=6)
    rows = rows_read(model)
    inputs = left_padded(REPEATED)
    output = model.generate(
        **inputs, alpha=torch.tensor(ALPHAS), decoding=decoding, max_new_tokens=6, do_sample=False, pad_token_id=PAD
    )
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
    assert rows[0] == len(PROMPTS)
    assert decoding == "alternating" or set(rows[1:]) == {len(REPEATED)}


def test_beams_and_returned_sequences_share_the_prefill():
    model, _ = build("qwen2", "llama")
    inputs = left_padded(PROMPTS)
    arguments = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": PAD,
        "num_beams": 3,
        "num_return_sequences": 2,
    }
    apart = [model.generate(**left_padded([prompt]), **arguments)[:, len(prompt) :].tolist() for prompt in PROMPTS]
    rows = rows_read(model)
    together = model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]
    assert together.tolist() == [row for pair in apart for row in pair]
    assert rows[0] == len(PROMPTS)


def test_prompts_with_equal_ids_but_other_masks_or_positions_are_different():
    ids = torch.tensor([[5, 5, 7], [5, 5, 7], [5, 5, 7], [5, 5, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 1, 1]])
    prompts = distinct_prompts(ids, mask)
    assert prompts.prompt_B[0] == prompts.prompt_B[2] != prompts.prompt_B[1] == prompts.prompt_B[3]
    assert sorted(prompts.first_R.tolist()) == [0, 1]
    assert torch.equal(prompts.expand(prompts.select(mask)), mask)
    positions = torch.tensor([[0, 1, 2], [0, 1, 2], [4, 5, 6], [4, 5, 6]])
    assert distinct_prompts(ids, mask, positions) is None


@pytest.mark.parametrize("shared", [{"attention_mask": None}, {"position_ids": torch.arange(5)[None]}])
@torch.no_grad()
def test_arguments_of_one_row_are_for_the_whole_batch(shared):
    model, members = build("qwen2", "llama")
    ids = torch.tensor([[5, 17, 9, 33, 21], [12, 50, 7, 4, 6], [5, 17, 9, 33, 21]])
    output = model(input_ids=ids, logits_to_keep=1, use_cache=True, alpha=0.3, **shared)
    expected = 0.7 * members[0](ids).logits + 0.3 * members[1](ids).logits
    torch.testing.assert_close(output.logits[:, -1], expected[:, -1], rtol=1e-5, atol=1e-5)
    assert {len(layer.keys) for layer in output.past_key_values.layers} == {len(ids)}


@pytest.mark.parametrize("argument", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_hidden_states_are_those_of_every_row(argument):
    model, _ = build("qwen2", "llama")
    for member in model.members:
        member.set_attn_implementation("eager")
    field = argument.removeprefix("output_")
    ids = torch.tensor([[5, 17, 9], [5, 17, 9]])
    asked = model(input_ids=ids, logits_to_keep=1, use_cache=True, **{argument: True})
    assert {len(states) for states in getattr(asked, field)} == {len(ids)}
    for member in model.members:
        setattr(member.config, argument, True)
    by_config = model(input_ids=ids, logits_to_keep=1, use_cache=True)
    assert {len(states) for states in getattr(by_config, field)} == {len(ids)}


@pytest.mark.parametrize("kind", ["static", "filled"])
@torch.no_grad()
def test_other_caches_are_filled_row_by_row(kind):
    model, members = build("qwen2", "llama")
    ids = torch.tensor([[5, 17, 9, 3], [5, 17, 9, 3], [12, 50, 7, 4]])
    if kind == "static":
        output = model(
            input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=8), logits_to_keep=1
        )
    else:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :2], past_key_values=cache)
        output = model(input_ids=ids[:, 2:], past_key_values=cache, logits_to_keep=1)
    expected = 0.5 * members[0](ids).logits + 0.5 * members[1](ids).logits
    torch.testing.assert_close(output.logits[:, -1], expected[:, -1], rtol=1e-5, atol=1e-5)
