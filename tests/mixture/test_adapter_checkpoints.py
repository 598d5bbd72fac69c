"""Saving, loading and exporting mixtures of adapters."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import KINDS, VARIANTS, lora, mixture, reference, save_adapter
from tests.helpers.members import character_tokenizer, logits, tiny_member

# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_restored_bit_for_bit_and_saves_the_base_once(kind, tied, tmp_path):
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    folders = {"base": str(tmp_path / "base"), "sft": str(tmp_path / "sft")}
    for seed, name in enumerate(["policy adapter", "anchor adapter"]):
        folders[name] = save_adapter(tmp_path / name, folders["base"], seed)
    model = mixture(kind, folders)
    model.save_pretrained(tmp_path / "mixture")
    loaded, info = LogitMixForCausalLM.from_pretrained(tmp_path / "mixture", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.adapters == model.config.adapters
    for alpha in (0.0, 0.3, 1.0):
        assert torch.equal(logits(loaded, alpha=alpha), logits(model, alpha=alpha))
    with safe_open(tmp_path / "mixture" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum("embed_tokens" in name for name in names) == (2 if kind == "full anchor" else 1)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    for member in loaded.members:
        assert (member.lm_head.weight is member.get_input_embeddings().weight) is tied
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_adapters_on_a_base_in_half_precision_are_float32(tmp_path):
    """As in PEFT: bfloat16 loses an update of 1e-5."""
    tiny_member("qwen2", 0).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", 1)
    model = LogitMixForCausalLM.from_members(adapter, tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "mixture")
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")):
        for name, parameter in each.named_parameters():
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert torch.equal(logits(each), logits(model))
    with safe_open(adapter + "/adapter_model.safetensors", "pt") as file:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        loaded = model.policy.get_parameter("model.layers.0.self_attn.q_proj.lora_A.policy.weight")
        assert torch.equal(file.get_tensor(name), loaded)


def test_a_checkpoint_without_the_adapters_field_loads(tmp_path):
    model = LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["adapters"]
    path.write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# --- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", [False, True])
def test_an_exported_member_loads_in_transformers_alone(kind, merge, folders, tmp_path):
    mixture(kind, folders).save_pretrained(tmp_path / "mixture")
    model = LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")
    before = copy.deepcopy(model.state_dict())
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        folder = tmp_path / name
        model.export_member(name, folder, merge=merge)
        is_adapter = (folder / "adapter_config.json").exists()
        assert is_adapter == (not merge and model.config.adapters.get(name, "off") != "off")
        assert is_adapter != (folder / "config.json").exists()
        exported = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(exported), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == character_tokenizer().get_vocab()
        if is_adapter:
            torch.testing.assert_close(logits(reference(folder)), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_export(variant, folders, tmp_path):
    """Read by PEFT: transformers 5.19 loses the magnitudes of an unmerged DoRA adapter."""
    first = save_adapter(tmp_path / "first", folders["base"], 3, **VARIANTS[variant])
    model = LogitMixForCausalLM.from_members(folders["anchor adapter"], first)
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        for merge in (False, True):
            folder = tmp_path / f"{name}_{merge}"
            model.export_member(name, folder, merge=merge)
            torch.testing.assert_close(logits(reference(folder)), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)


def test_an_exported_policy_can_be_an_anchor(folders, tmp_path):
    model = mixture("two adapters", folders)
    model.export_member("policy", tmp_path / "policy")
    following = LogitMixForCausalLM.from_members(folders["base"], tmp_path / "policy", peft_config=lora())
    assert len(following.anchors) == 0
    torch.testing.assert_close(logits(following, alpha=1.0), logits(model, alpha=0.0))


def test_save_pretrained_of_the_policy_saves_its_adapter(folders, tmp_path):
    model = mixture("two adapters", folders)
    model.policy.save_pretrained(tmp_path / "policy")
    torch.testing.assert_close(logits(reference(tmp_path / "policy")), logits(model, alpha=0.0))


def test_members_without_adapters_export(tmp_path):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("llama", 1))
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0), ("anchor", 1.0)):
        model.export_member(name, tmp_path / name)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model, alpha=alpha))


def test_exports_of_unknown_members_and_nameless_bases_are_rejected(tmp_path):
    member = tiny_member("qwen2", 0)
    model = LogitMixForCausalLM.from_members(member, member, peft_config=lora())
    with pytest.raises(ValueError, match="there is no member 'anchor_1'; the members are policy, anchor_0"):
        model.export_member("anchor_1", tmp_path)
    anchors = [tiny_member("qwen2", 1), tiny_member("qwen2", 2)]
    several = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), anchors, weights=[1.0, 0.5, -0.5])
    with pytest.raises(ValueError, match="there is no member 'anchor'; the members are policy, anchor_0, anchor_1"):
        several.export_member("anchor", tmp_path)
    with pytest.raises(ValueError, match=r"model that was passed in memory.*merge=True"):
        model.export_member("policy", tmp_path)
