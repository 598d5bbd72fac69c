"""Adapters that cannot run beside others in vLLM."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from torch import nn

from logitmix.serving import adapters
from logitmix.serving.adapters import SharedModel


def shared_model(monkeypatch, tensor_parallel_size=1):
    """A model without linear layers of vLLM, whose policy has an adapter."""
    monkeypatch.setattr(adapters, "get_tensor_model_parallel_world_size", lambda: tensor_parallel_size)
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 4)})
    return SharedModel(model, ["policy"], {"policy": {"r": 2}}, config=None)


def test_adapters_under_tensor_parallelism_are_rejected(monkeypatch):
    with pytest.raises(
        ValueError, match="tensor_parallel_size is 2, but must be 1 for members that are adapters; set"
    ):
        shared_model(monkeypatch, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "embed_tokens.lora_A.policy.weight",
            "is on embed_tokens, which is not a linear layer in vLLM; merge it with",
        ),
        ("embed_tokens.lora_embedding_A.policy", "cannot run beside other adapters in vLLM; merge the adapters with"),
        ("lm_head.modules_to_save.policy.weight", "cannot run beside other adapters in vLLM; merge the adapters with"),
    ],
)
def test_adapters_of_other_layers_or_kinds_are_rejected(monkeypatch, name, message):
    with pytest.raises(ValueError, match=message):
        shared_model(monkeypatch).load_adapter_weight(name, torch.zeros(2, 8))


def test_a_weight_of_no_adapter_is_left_to_the_model(monkeypatch):
    assert not shared_model(monkeypatch).load_adapter_weight("embed_tokens.weight", torch.zeros(8, 4))
