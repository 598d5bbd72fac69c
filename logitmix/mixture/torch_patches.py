"""What works around `F.linear` in a member: copies of a frozen weight, and slow products of few rows on AMD.

`tests/mixture/test_torch_patches.py` has their tests, which fail when a new torch changes what they rely on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_LARGE = 1 << 19  # elements of a weight; for smaller ones oneDNN is not faster


def avoid_weight_copies(model: PreTrainedModel) -> None:
    """Give contiguous inputs to the layers of `model` whose inputs are slices or transposes.

    Where a weight requires no gradient, `F.linear` of a `[B, T, D]` input that is not contiguous, such as the
    `hidden[:, -1:]` of a prefill, is a batched product with B copies of the weight: for 60 prompts and a bfloat16 head
    of 49,152 tokens 6.7 s and 3.3 GB on a CPU, against 0.03 s for a contiguous input.

    Those layers are the head, which reads the last hidden states of a slice of the tokens, and the linear layers
    beside a convolution, which reads `[B, D, T]`. Applying this again changes nothing.
    """
    for layer in _layers_of_slices(model):
        if _make_contiguous not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_make_contiguous)


def _layers_of_slices(model: PreTrainedModel) -> set[nn.Module]:
    backbone = set(model.base_model.modules())
    layers = {module for module in model.modules() if isinstance(module, nn.Linear) and module not in backbone}
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(child, _CONVOLUTIONS) for child in children):
            layers |= {child for child in children if isinstance(child, nn.Linear)}
    return layers | ({head} if (head := model.get_output_embeddings()) is not None else set())


def _make_contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_contiguous(x) if isinstance(x, Tensor) and x.dim() > 2 else x for x in inputs)


def _contiguous(x: Tensor) -> Tensor:
    # flattened as well: an axis of size 1 may have any stride in a contiguous tensor, and `F.linear` compares strides
    return x.contiguous().flatten(0, -2).view(x.shape)


@contextmanager
def fast_products_of_few_rows(model: nn.Module) -> Iterator[None]:
    """Within the context, multiply by the large float32 weights of `model` with oneDNN on an AMD processor.

    `F.linear` takes MKL for float32, whose products of few rows are slow there: 2 rows by a head of 49,152 tokens and
    width 576 take 28 ms, against 12 ms for 1 row, and 6 ms by oneDNN (`benchmarks/few_rows.py`, two cores of an EPYC).
    Only without gradients.
    """
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in linear if is_amd() and has_onednn() and _is_large(layer)]
    for layer in layers:
        layer.forward = partial(_multiply, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@cache
def is_amd() -> bool:
    """Whether this is an AMD processor."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def has_onednn() -> bool:
    """Whether oneDNN is enabled and can use AVX-512, without which it has no advantage over MKL."""
    is_enabled = bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_enabled and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of float32 on a CPU by oneDNN: torch itself takes it for lower precisions only."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_large(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_plain = weight.dtype == torch.float32 and type(weight.data) is Tensor and weight.is_cpu
    return is_plain and weight.numel() >= _LARGE and "forward" not in vars(layer)  # another hook's is left alone


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
        return nn.functional.linear(x, layer.weight, layer.bias)
    return onednn_linear(x, layer.weight, layer.bias)
