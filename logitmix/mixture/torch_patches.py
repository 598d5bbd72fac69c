"""What works around torch in a member: the copies that `F.linear` makes of a frozen weight.

`tests/mixture/test_torch_patches.py` has its test, which fails when a new version of torch changes what it relies on.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


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
