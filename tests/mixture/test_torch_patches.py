"""Contracts with torch: how it multiplies by frozen weights, and that no member pays for copies of them."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from logitmix.mixture import torch_patches
from logitmix.mixture.loading import load_member
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.torch_patches import avoid_weight_copies, onednn_linear
from tests.helpers.adapters import lora
from tests.helpers.architectures import tiny_causal_model
from tests.helpers.contracts import assert_has
from tests.helpers.members import INPUT, tiny_member


class ExpandedWeights(TorchDispatchMode):
    """Counts the parameters of a model that operations repeat for every sequence of a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() == 2}
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.expand.default and output.numel() > args[0].numel():
            self.found |= {self.names[key]} if (key := args[0].untyped_storage().data_ptr()) in self.names else set()
        return output


# multiplied by the architecture itself, `weight @ x`, and small: no layer's input can change that
_NOT_IN_A_LAYER = ("dt_proj.weight", "x_proj_weight", "dt_proj_weight")


@torch.no_grad()
def expanded_weights(model: PreTrainedModel, **kwargs: Any) -> set[str]:
    with ExpandedWeights(model) as mode:
        model.generate(**INPUT, max_new_tokens=3, do_sample=False, **kwargs)
        model(**INPUT, logits_to_keep=2)
    return {name for name in mode.found if not name.endswith(_NOT_IN_A_LAYER)}


def test_torch_copies_a_frozen_weight_for_each_sequence_of_a_slice():
    """If it no longer does, `avoid_weight_copies` can go."""
    layer = nn.Linear(8, 16, bias=False)
    assert_has("torch", layer, "_forward_pre_hooks")
    hidden = torch.randn(3, 5, 8)
    for frozen, sliced in ((True, True), (True, False), (False, True)):
        layer.requires_grad_(not frozen)
        with torch.no_grad(), ExpandedWeights(layer) as mode:
            layer(hidden[:, -1:] if sliced else hidden[:, -1:].contiguous())
        assert bool(mode.found) is (frozen and sliced)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "gpt2", "bert", "jamba", "zamba"])
def test_a_frozen_model_copies_no_weights(model_type):
    model = tiny_causal_model(model_type).requires_grad_(False)
    expected = model(**INPUT, logits_to_keep=2).logits
    assert expanded_weights(copy.deepcopy(model))
    avoid_weight_copies(model)
    avoid_weight_copies(model)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 1
    assert expanded_weights(model) == set()
    assert expanded_weights(copy.deepcopy(model)) == set()
    torch.testing.assert_close(model(**INPUT, logits_to_keep=2).logits, expected)


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_a_mixture_copies_no_weights(scheme, tmp_path):
    pair = tiny_member("qwen2", 0), tiny_member("llama", 1)
    model = LogitMixForCausalLM.from_members(*pair, alpha=0.3, scheme=scheme)
    assert expanded_weights(model) == set()
    model.policy.requires_grad_(False)
    assert expanded_weights(model, alpha=0.0) == expanded_weights(model, alpha=1.0) == set()
    model.save_pretrained(tmp_path)
    assert expanded_weights(LogitMixForCausalLM.from_pretrained(tmp_path)) == set()


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["q_proj", "lm_head"])
def test_members_on_one_base_copy_no_weights(options):
    base = tiny_member()
    model = LogitMixForCausalLM.from_members(base, base, peft_config=lora(**options))
    assert expanded_weights(model) == set()
    assert expanded_weights(model, alpha=1.0) == set()


def test_a_loaded_model_copies_no_weights_once_it_is_frozen(tmp_path):
    """As a merge of a sweep, and the base of an adapter that trains alone."""
    tiny_member().save_pretrained(tmp_path)
    assert expanded_weights(load_member(str(tmp_path)).requires_grad_(False)) == set()
    adapted = get_peft_model(load_member(str(tmp_path)), lora())
    assert not adapted.get_output_embeddings().weight.requires_grad
    assert expanded_weights(adapted) == set()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_multiplies_as_linear_does(rows, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 333, bias=bias), torch.randn(2, rows, 48)
    with torch.no_grad():
        found = onednn_linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found.double(), layer.double()(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_large_layers_multiply_by_onednn_on_amd_and_are_restored(monkeypatch):
    monkeypatch.setattr(torch_patches, "is_amd", lambda: True)
    monkeypatch.setattr(torch_patches, "has_onednn", lambda: True)
    calls = []
    monkeypatch.setattr(torch_patches, "onednn_linear", lambda *args: calls.append(args) or onednn_linear(*args))
    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 4), nn.Linear(4, 1024 * 128, dtype=torch.bfloat16))
    x = torch.randn(2, 1024)
    with torch.no_grad():
        expected = model[:2](x)
        with torch_patches.fast_products_of_few_rows(model):
            torch.testing.assert_close(model[:2](x), expected)
            with torch.autocast("cpu", torch.bfloat16):
                assert model[0](x).dtype == torch.bfloat16
            assert len(calls) == 1, "small layers, other dtypes and autocast take F.linear"
    with torch_patches.fast_products_of_few_rows(model):
        assert model[0](x).requires_grad
    model[0](x)
    assert len(calls) == 1
    assert not any("forward" in vars(layer) for layer in model)
