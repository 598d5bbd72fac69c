"""Members that are one model and differ in their prompts: one copy of the weights, and one pass over them."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import PAD, tiny_member
from tests.mixture.test_generation import PROMPTS, generate, left_padded
from tests.mixture.test_member_prompts import OTHERS, THIRD, reference

GUIDANCE = {"weights": [1.5, -0.5]}
PREFIXES = {"anchor": OTHERS}


def guided(architecture="qwen2", **kwargs):
    """A mixture of one model with itself, and the model."""
    model = tiny_member(architecture)
    return LogitMixForCausalLM.from_members(model, model, **(GUIDANCE | kwargs)), model


def passes_of(model):
    """The number of rows of each pass of the policy's model, filled while it runs."""
    generate(model, max_new_tokens=1)  # the first pass finds out how the head transforms states
    rows = []
    model.policy.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-sliding", "gemma2", "gpt2"])
def test_one_pass_decodes_as_if_each_member_ran_alone(architecture, cache):
    model, member = guided(architecture)
    rows = passes_of(model)
    output = generate(model, member_prompts=PREFIXES, **cache)
    passes = list(rows)
    assert torch.equal(output, reference([member, member], [1.5, -0.5], [PROMPTS, OTHERS]))
    assert passes == [6] * 8


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("architecture", ["qwen2-sliding", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", ["policy", "anchor"])
def test_a_much_shorter_prompt_takes_no_padding(architecture, cache, name):
    """It is read in a pass of its own, and has a cache of its own length, unless caches have a fixed length."""
    model, member = guided(architecture)
    rows, short = passes_of(model), [[3], [4, 5], [6]]
    output = model.generate(
        **left_padded(PROMPTS), **cache, member_prompts={name: short}, max_new_tokens=8, do_sample=False,
        pad_token_id=PAD, return_dict_in_generate=True,
    )  # fmt: skip
    passes = list(rows)
    contexts = [PROMPTS, short] if name == "anchor" else [short, PROMPTS]
    assert torch.equal(output.sequences[:, 7:], reference([member, member], [1.5, -0.5], contexts))
    if not cache:
        assert passes == [3, 3] + [6] * 7
        layers = output.past_key_values.layers
        assert [layers[0].get_seq_length(), layers[-1].get_seq_length()] == [max(map(len, c)) + 7 for c in contexts]


def test_long_prompts_are_read_one_after_another():
    """In one pass, their activations would take twice the memory, and hardly less time."""
    model, member = guided()
    rows, prompts, others = passes_of(model), [[5, 17, 9] * 30] * 3, [[3, 4] * 44] * 3
    prompts, others = [[*ids, i] for i, ids in enumerate(prompts)], [[*ids, i] for i, ids in enumerate(others)]
    output = generate(model, prompts, member_prompts={"anchor": others})
    passes = list(rows)
    assert torch.equal(output, reference([member, member], [1.5, -0.5], [prompts, others]))
    assert passes == [3, 3] + [6] * 7


@pytest.mark.parametrize("prompts", [{"anchor": [3]}, {"policy": OTHERS}], ids=["shorter", "of the policy"])
def test_either_member_may_have_the_shorter_prompt(prompts):
    model, member = guided()
    given = prompts.get("policy", PROMPTS), prompts.get("anchor", PROMPTS)
    contexts = [own if isinstance(own[0], list) else [own] * 3 for own in given]
    assert torch.equal(generate(model, member_prompts=prompts), reference([member, member], [1.5, -0.5], contexts))


def test_three_members_on_one_model_in_the_scheme_prob():
    model = tiny_member("qwen2")
    mixture = LogitMixForCausalLM.from_members(model, [model, model], weights=[0.5, 0.3, 0.2], scheme="prob")
    rows = passes_of(mixture)
    output = generate(mixture, member_prompts={"anchor_0": OTHERS, "anchor_1": THIRD})
    passes = list(rows)
    assert torch.equal(output, reference([model] * 3, [0.5, 0.3, 0.2], [PROMPTS, OTHERS, THIRD], "prob"))
    assert passes == [3] * 3 + [9] * 7


def test_a_third_member_has_weights_of_its_own():
    model, other = tiny_member("qwen2"), tiny_member("llama", seed=1)
    mixture = LogitMixForCausalLM.from_members(model, [other, model], weights=[1.2, 0.5, -0.7])
    rows = passes_of(mixture)
    output = generate(mixture, member_prompts={"anchor_0": THIRD, "anchor_1": OTHERS})
    passes = list(rows)
    assert torch.equal(output, reference([model, other, model], [1.2, 0.5, -0.7], [PROMPTS, THIRD, OTHERS]))
    assert passes == [6] * 8


def test_beams_samples_and_repeated_prompts():
    model, member = guided()
    apart = LogitMixForCausalLM.from_members(member, tiny_member("qwen2"), **GUIDANCE)
    for settings in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 4}):
        outputs = []
        for each in (model, apart):
            torch.manual_seed(3)
            outputs.append(generate(each, member_prompts=PREFIXES, **settings))
        assert torch.equal(*outputs)


def test_without_gradients_forward_and_score_run_once():
    model, member = guided()
    apart = LogitMixForCausalLM.from_members(member, tiny_member("qwen2"), **GUIDANCE)
    inputs = left_padded(PROMPTS)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    rows = passes_of(model)
    with torch.no_grad():
        scores = [each.score(**inputs, labels=labels, member_prompts=PREFIXES) for each in (model, apart)]
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert rows[0] == 6


def test_the_gradient_is_that_of_the_policys_pass():
    model, member = guided()
    copy = tiny_member("qwen2")
    apart = LogitMixForCausalLM.from_members(copy, tiny_member("qwen2"), **GUIDANCE)
    inputs = left_padded(PROMPTS)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    for each in (model, apart):
        each.train()
        each(**inputs, labels=labels, member_prompts=PREFIXES).loss.backward()
    for parameter, expected in zip(member.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_the_weights_are_held_and_saved_once(tmp_path):
    model, member = guided()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in member.parameters())
    assert model.weight_bytes()[1] == model.weight_bytes()[0]
    expected = generate(model, member_prompts=PREFIXES)
    model.save_pretrained(tmp_path / "mixture")
    member.save_pretrained(tmp_path / "member")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("mixture", "member")]
    assert sizes[0] < 1.1 * sizes[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in member.parameters())
    assert loaded.config.weights == [1.5, -0.5]
    assert torch.equal(generate(loaded, member_prompts=PREFIXES), expected)
    for name in ("policy", "anchor"):
        loaded.export_member(name, tmp_path / name)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(torch.equal(*pair) for pair in zip(exported.parameters(), member.parameters(), strict=True))


def test_the_same_prompt_for_all_gives_the_model_itself():
    model, member = guided()
    own = member.generate(**left_padded(PROMPTS), max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    assert torch.equal(generate(model), own[:, 7:])
    assert torch.equal(generate(model, member_prompts={"anchor": PROMPTS}), own[:, 7:])


def test_two_anchors_on_the_base_of_an_adapter_run_together():
    model = tiny_member("qwen2")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    mixture = LogitMixForCausalLM.from_members(model, [model, model], weights=[1.0, 0.5, -0.5], peft_config=lora)
    rows = passes_of(mixture)
    output = generate(mixture, member_prompts={"anchor_0": OTHERS, "anchor_1": THIRD})
    passes = list(rows)

    def run(name):
        def member(*args, **kwargs):
            with mixture.as_member(name) as running:
                return running(*args, **kwargs)

        return member

    members = [run("policy"), run("anchor_0"), run("anchor_0")]
    assert torch.equal(output, reference(members, [1.0, 0.5, -0.5], [PROMPTS, OTHERS, THIRD]))
    assert passes == [3] * 3 + [3, 6] * 7
