"""What the plug-in replaces in vLLM's layers, and the settings it makes for the whole process.

Written against vLLM 0.32; tests/serving/test_vllm_patches.py is the contract.
"""

import copy
import os
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def choose_first_model_runner() -> None:
    """Choose vLLM's first model runner, which asks `RequestWeights` about requests; vLLM reads the choice afterwards.

    Raises `ValueError` where the environment asks for the second, whose logits processors have another interface.
    """
    if os.environ.get(RUNNER, "0") != "0":
        raise ValueError(
            f"{RUNNER} is {os.environ[RUNNER]!r}; a mixture runs in vLLM's first model runner: set it to 0, or unset "
            "it"
        )
    os.environ[RUNNER] = "0"


def add_to_output(layer: LinearBase, add: Callable[[Tensor, Tensor], None]) -> None:
    """Call `add(output, input)` in place on each output of a linear layer, as vLLM has no hook there."""
    base_forward = layer.forward

    def forward(layer: LinearBase, x: Tensor) -> Any:
        output = base_forward(x)
        add(output[0] if isinstance(output, tuple) else output, x)
        return output

    layer.forward = MethodType(forward, layer)


def split_attention(attention: Attention, members: Sequence[str], config: VllmConfig) -> None:
    """Make an attention layer one layer for each member, which differ in name only.

    vLLM gives each name its own share of the KV cache. The input holds the members' tokens one after the other.
    """
    registry = config.compilation_config.static_forward_context
    layers = [attention]
    path = attention.layer_name.partition(".")[2]
    for name in members[1:]:
        layer = copy.copy(attention)
        layer.layer_name = f"{name}.{path}"
        layer.impl = copy.copy(attention.impl)
        registry[layer.layer_name] = layer
        layers.append(layer)
    base_forward = type(attention).forward

    def forward(
        self: Attention, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
    ) -> Tensor:
        K = len(layers)
        if output_shape is not None:
            output_shape = torch.Size((output_shape[0] // K, *output_shape[1:]))
        chunks = zip(layers, query.chunk(K), key.chunk(K), value.chunk(K), strict=True)
        return torch.cat([base_forward(layer, q, k, v, output_shape, output_dtype) for layer, q, k, v in chunks])

    attention.forward = MethodType(forward, attention)


def query_starts() -> Tensor | None:
    """The first token of each request of the running batch; None while vLLM measures memory without requests."""
    metadata = get_forward_context().attn_metadata
    return None if metadata is None else next(iter(metadata.values())).query_start_loc
