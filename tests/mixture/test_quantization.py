"""Members with quantised weights: what may be asked for, how they score, and that they are saved as they are."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from logitmix.mixture.loading import load_member
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import NAMED, as_quantization, num_bytes
from tests.helpers.members import INPUT, character_tokenizer, logits, tiny_member

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
LARGE = {"hidden_size": 64, "intermediate_size": 128}  # int4 has groups of 32


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    for name, seed in (("policy", 0), ("anchor", 1)):
        tiny_member("qwen2", seed, **LARGE).save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    return folder


def built(members, quantization, **kwargs):
    return LogitMixForCausalLM.from_members(
        str(members / "policy"), str(members / "anchor"), alpha=0.4,
        quantization_config={"anchor_0": quantization}, **kwargs,
    )  # fmt: skip


def dequantized(members, name):
    """The anchor with plain weights that have the quantised values."""
    quantized, plain = built(members, name).anchor_0, AutoModelForCausalLM.from_pretrained(members / "anchor")
    layers = {path: layer for path, layer in quantized.named_modules() if hasattr(layer, "weight")}
    for path, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            identity = torch.eye(layer.in_features)
            layer.weight.data = (layers[path](identity) - (0 if layer.bias is None else layer.bias)).detach().t()
    return plain


@pytest.mark.parametrize("name", NAMED)
def test_only_the_anchors_linear_layers_are_quantised(members, name):
    model = built(members, name)
    assert model.config.quantized_models == ["anchor_0"]
    decoder = sum(p.numel() for p in model.policy.model.layers.parameters())
    held = sum(map(num_bytes, model.anchor_0.model.layers.parameters()))
    assert held < 1.3 * decoder, "a byte for each number of the layers, and scales"
    whole = sum(map(num_bytes, model.policy.parameters()))
    assert model.weight_bytes()[0] == whole + sum(map(num_bytes, model.anchor_0.parameters()))
    assert torch.equal(
        model.anchor_0.lm_head.weight, AutoModelForCausalLM.from_pretrained(members / "anchor").lm_head.weight
    )
    assert all(type(p.data) is torch.Tensor and p.requires_grad for p in model.policy.parameters())
    assert not any(p.requires_grad for p in model.anchor_0.parameters())


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_mixture_scores_with_the_quantised_values(members, name):
    expected = LogitMixForCausalLM.from_members(
        AutoModelForCausalLM.from_pretrained(members / "policy"), dequantized(members, name), alpha=0.4
    )
    torch.testing.assert_close(logits(built(members, name)), logits(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMED)
def test_a_saved_mixture_loads_bit_for_bit_in_the_same_bits(members, name, tmp_path):
    model = built(members, name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    again = LogitMixForCausalLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    shutil.move(tmp_path / "b", tmp_path / "moved")
    for loaded in (again, AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype="auto")):
        assert torch.equal(logits(loaded), expected)
        assert loaded.weight_bytes() == model.weight_bytes()
        assert not any(p.requires_grad for p in loaded.anchor_0.parameters())
        assert loaded.tokenizer is not None or loaded is not again
    model.export_member("anchor", tmp_path / "alone")
    assert torch.equal(logits(load_member(str(tmp_path / "alone"))), logits(model.anchor_0))
    assert model.generate(**INPUT, max_new_tokens=2).shape == (2, 7)


def test_a_checkpoint_that_is_quantised_already_is_an_anchor_as_it_is(members, tmp_path):
    anchor = AutoModelForCausalLM.from_pretrained(members / "anchor", quantization_config=as_quantization("int8"))
    anchor.save_pretrained(tmp_path / "anchor")
    character_tokenizer().save_pretrained(tmp_path / "anchor")
    expected = logits(built(members, "int8"))
    for source in (anchor, str(tmp_path / "anchor")):
        model = LogitMixForCausalLM.from_members(str(members / "policy"), source, alpha=0.4)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "mixture")
        assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")), expected)
    with pytest.raises(ValueError, match=r"anchor_0 at .* is quantised already, with torchao; leave out"):
        LogitMixForCausalLM.from_members(
            str(members / "policy"), str(tmp_path / "anchor"), quantization_config={"anchor_0": "int8"}
        )


@pytest.mark.parametrize(
    "value",
    [
        {"load_in_8bit": True},
        '{"quant_method": "bitsandbytes", "load_in_8bit": true}',
        BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes-8bit",
    ],
    ids=["dict", "JSON", "object", "name"],
)
def test_a_quantisation_is_a_name_or_a_configuration_of_transformers(value):
    assert as_quantization(value).to_dict() == BitsAndBytesConfig(load_in_8bit=True).to_dict()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("int3", r"the quantisation is 'int3'; it must be int8, int4, bitsandbytes-8bit, bitsandbytes-4bit, or a"),
        (8, "the quantisation is 8; it must be int8"),
        ({}, r"the quantisation \{\} cannot be used"),
        ('{"quant_method": "none"}', "cannot be used: Unknown quantization type"),
        ('{"quant_method": ', "cannot be used: Expecting value"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "cannot be used"),
    ],
)
def test_other_quantisations_are_refused(value, reason):
    with pytest.raises(ValueError, match=reason):
        as_quantization(value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("logitmix.mixture.quantization.find_spec", lambda package: None)
    with pytest.raises(ValueError, match="'int8' needs torchao, which is not installed; pip install torchao"):
        as_quantization("int8")


def test_what_a_device_cannot_do_is_said_with_the_way_out(members, tmp_path):
    shutil.copytree(members / "anchor", tmp_path / "anchor")
    values = json.loads((tmp_path / "anchor" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "anchor" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"cannot be held with quantised weights here \(.*; install what"):
        LogitMixForCausalLM.from_members(str(members / "policy"), str(tmp_path / "anchor"))


def test_members_that_cannot_be_quantised_are_refused(members):
    loaded = AutoModelForCausalLM.from_pretrained(members / "anchor")
    with pytest.raises(ValueError, match="anchor_0 is a loaded model, which is not quantised any more"):
        LogitMixForCausalLM.from_members(str(members / "policy"), loaded, quantization_config={"anchor_0": "int8"})
    with pytest.raises(ValueError, match="quantization_config names 'anchor_1', which is no member"):
        LogitMixForCausalLM.from_members(
            str(members / "policy"), loaded, quantization_config={"anchor_0": None, "anchor_1": "int8"}
        )
