"""Contracts with PEFT: what mixtures set of its layers."""

import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from logitmix.mixture import peft_patches as patches
from logitmix.mixture.adapters import adapter_layers
from tests.helpers.adapters import lora
from tests.helpers.contracts import assert_has
from tests.helpers.members import logits, tiny_member


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"init_lora_weights": False}, BaseTunerLayer), ({"modules_to_save": ["lm_head"]}, AuxiliaryTrainingWrapper)],
    ids=["lora", "modules_to_save"],
)
def test_the_private_attribute_of_a_layer_selects_its_adapter(options, kind):
    member = tiny_member()
    expected = logits(member)
    inject_adapter_in_model(lora(**options), member, "policy")
    layers = [layer for _, layer in adapter_layers(member) if isinstance(layer, kind)]
    assert layers
    for layer in layers:
        assert_has("peft", layer, "_active_adapter")
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
    for name, parameter in member.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 1
    for _, layer in adapter_layers(member):
        patches.set_active_adapters(layer, [])
    assert torch.equal(logits(member), expected)
    for layer in layers:
        patches.set_active_adapters(layer, ["policy"])
        assert layer.active_adapters == ["policy"]
    assert not torch.equal(logits(member), expected)
    assert not any(p.requires_grad for layer in layers for p in layer.parameters()), "the adapter became trainable"
