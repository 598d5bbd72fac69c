"""Each member of a mixture has a dtype of its own."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import INPUT, character_tokenizer, logits, tiny_member

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Folders: a float32 policy, an anchor in bfloat16, and the same weights in float32."""
    folder = tmp_path_factory.mktemp("members")
    tiny_member("qwen2", 0).save_pretrained(folder / "policy")
    anchor = tiny_member("llama", 1, dtype=BF16)
    anchor.save_pretrained(folder / "bf16")
    anchor.float().save_pretrained(folder / "fp32")
    for name in ("policy", "bf16", "fp32"):
        character_tokenizer().save_pretrained(folder / name)
    return folder


def dtypes(model):
    return [{p.dtype for p in member.parameters()} for member in model.members]


def built(members, anchor="bf16", **kwargs):
    return LogitMixForCausalLM.from_members(str(members / "policy"), str(members / anchor), alpha=0.4, **kwargs)


def test_each_member_has_the_dtype_of_its_checkpoint_or_the_one_asked_for(members):
    assert dtypes(built(members)) == [{F32}, {BF16}]
    assert dtypes(built(members, dtype="float32")) == [{F32}, {F32}]
    assert dtypes(built(members, dtype={"policy": BF16})) == [{BF16}, {BF16}]
    assert dtypes(built(members, dtype={"anchor_0": "float16"})) == [{F32}, {F16}]
    assert dtypes(built(members, "fp32", dtype={"policy": "auto", "anchor_0": "torch.bfloat16"})) == [{F32}, {BF16}]


def test_members_are_saved_and_loaded_in_their_own_dtypes(members, tmp_path):
    model = built(members)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["member_dtypes"] == {"anchor_0": "bfloat16"}
    for load in (LogitMixForCausalLM, AutoModelForCausalLM):
        for asked in ({}, {"dtype": "auto"}, {"dtype": {}}):
            loaded = load.from_pretrained(tmp_path, **asked)
            assert dtypes(loaded) == [{F32}, {BF16}]
            assert torch.equal(logits(loaded), logits(model))
        assert dtypes(load.from_pretrained(tmp_path, dtype="float32")) == [{F32}, {F32}]
        assert dtypes(load.from_pretrained(tmp_path, dtype=BF16)) == [{BF16}, {BF16}]
        assert dtypes(load.from_pretrained(tmp_path, dtype={"policy": BF16})) == [{BF16}, {BF16}]
        assert dtypes(load.from_pretrained(tmp_path, dtype={"policy": F16, "anchor_0": F32})) == [{F16}, {F32}]
    loaded.half().save_pretrained(tmp_path / "half")
    assert dtypes(LogitMixForCausalLM.from_pretrained(tmp_path / "half")) == [{F16}, {F16}]
    wide = LogitMixForCausalLM.from_pretrained(tmp_path, dtype={"policy": BF16, "anchor_0": F32})
    wide.save_pretrained(tmp_path / "wide")
    assert dtypes(LogitMixForCausalLM.from_pretrained(tmp_path / "wide")) == [{BF16}, {F32}]
    assert dtypes(LogitMixForCausalLM.from_pretrained(tmp_path / "wide", dtype={"policy": F32})) == [{F32}, {F32}]


def test_a_checkpoint_without_members_dtypes_loads_in_the_policys(members, tmp_path):
    built(members).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["member_dtypes"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dtypes(LogitMixForCausalLM.from_pretrained(tmp_path)) == [{F32}, {F32}]


def test_wrong_dtypes_are_refused(members):
    for dtype, message in (
        ({"anchor": "bfloat16"}, "dtype names 'anchor', which is no member; the members are policy, anchor_0"),
        ({"anchor_0": "bf16"}, "dtype is 'bf16'; it must be float32, bfloat16, float16 or auto"),
        ({"anchor_0": "int8"}, "dtype is 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            built(members, dtype=dtype)
    with pytest.raises(ValueError, match=r"dtype of policy is float16, but it is a loaded model in float32"):
        LogitMixForCausalLM.from_members(tiny_member(), str(members / "bf16"), dtype={"policy": "float16"})
    with pytest.raises(ValueError, match="dtype of anchor_0 is bfloat16, but it shares the policy's weights"):
        built(members, "policy", peft_config=LoraConfig(), dtype={"anchor_0": "bfloat16"})
    shared = built(members, "policy", peft_config=LoraConfig(), dtype={"policy": "bfloat16", "anchor_0": "bfloat16"})
    assert shared.policy.dtype == BF16


def test_logits_are_those_of_each_member_in_its_dtype(members):
    """The mixture adds no rounding: an fp32 copy of the weights differs as the anchor alone does."""
    mixed, copy = built(members), built(members, "fp32")
    anchors = [AutoModelForCausalLM.from_pretrained(members / name) for name in ("bf16", "fp32")]
    policy = AutoModelForCausalLM.from_pretrained(members / "policy")
    torch.testing.assert_close(logits(mixed), 0.6 * logits(policy) + 0.4 * logits(anchors[0]).float())
    assert torch.equal(logits(mixed, alpha=0.0), logits(policy))
    for bf16, fp32 in zip(anchors[0].parameters(), anchors[1].parameters(), strict=True):
        assert torch.equal(bf16.float(), fp32), "nothing is lost in the weights"
    real = INPUT["attention_mask"] == 1
    difference = (logits(mixed) - logits(copy))[real].abs().max()
    assert 0 < difference <= 0.4 * (logits(anchors[0]).float() - logits(anchors[1]))[real].abs().max() + 1e-5


@pytest.mark.parametrize("decoding", ["joint", "alternating"])
def test_decoding_takes_members_of_two_dtypes(members, decoding):
    model = built(members).eval()
    tokenizer = character_tokenizer()
    prompts = tokenizer(["ab=", "12+34-5="])["input_ids"]
    expected = []
    for ids in prompts:
        for _ in range(8):
            ids = [*ids, model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()]
        expected.append(ids[-8:])
    settings = {"max_new_tokens": 8, "do_sample": False}
    found = generate_completions(model, tokenizer, prompts, settings, decoding=decoding)
    for ids, other in zip(found, expected, strict=True):
        assert ids == other[: len(ids)]
        assert len(ids) == 8 or ids[-1] == tokenizer.eos_token_id
