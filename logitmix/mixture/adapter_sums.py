"""Setting one LoRA adapter to a sum of others on the same base.

A layer's adapter adds `s B A x`, so the sum of several is one with the rows of their A below each other, and the
columns of their B beside each other.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from logitmix.mixture.adapters import adapter_layers, has_adapter

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def set_to_sum(target: nn.Module, name: str, model: nn.Module, shares: Mapping[str, float]) -> None:
    """Set the adapter `name` of `target` to the sum of those of `model` in `shares`, each times its share.

    Both have the same base, and may be the same model. Raises `ValueError` where the adapter cannot hold the sum, and
    then changes nothing: it needs the others' layers and at least their ranks together. One that is more than LoRA's
    two factors (DoRA, biases, whole modules) is copied to one of the same kind and shape.
    """
    for weight, value in list(_assignments(target, name, model, shares)):
        weight.copy_(value)


def validate_holds_sum(target: nn.Module, name: str, model: nn.Module, shares: Mapping[str, float]) -> None:
    """Raise `ValueError` as `set_to_sum`, and change nothing."""
    for _ in _assignments(target, name, model, shares):
        pass


def _assignments(
    target: nn.Module, name: str, model: nn.Module, shares: Mapping[str, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights of the adapter, or parts of them, and their new values."""
    layers, of_sum = dict(adapter_layers(target)), dict(adapter_layers(model))
    for path in layers | of_sum:
        own, other = layers.get(path), of_sum.get(path)
        names = [each for each in shares if other is not None and has_adapter(other, each)]
        is_own = own is not None and has_adapter(own, name)
        if names and not is_own:
            raise ValueError(f"it has no weights at {path}")
        if is_own:
            assigned = _copied(own, name, other, names, shares) or _concatenated(own, name, other, names, shares)
            if assigned is None:
                raise ValueError(f"it is smaller, or of another kind, at {path}")
            yield from assigned


def _copied(
    own: Any, name: str, layer: Any, names: list[str], shares: Mapping[str, float]
) -> list[tuple[Tensor, Tensor]] | None:
    """The copy of a layer's only adapter, to one of the same kind and shape."""
    if len(names) != 1 or shares[names[0]] != 1 or type(own) is not type(layer):
        return None
    if isinstance(own, LoraLayer) and own.scaling[name] != layer.scaling[names[0]]:
        return None
    weights, values = _weights(own, name), _weights(layer, names[0])
    if [(key, w.shape) for key, w in weights] != [(key, w.shape) for key, w in values]:
        return None
    return [(weight, value) for (_, weight), (_, value) in zip(weights, values, strict=True)]


def _concatenated(
    own: Any, name: str, layer: Any, names: list[str], shares: Mapping[str, float]
) -> list[tuple[Tensor, Tensor]] | None:
    """The factors of the sum; the columns of B that are left become 0."""
    factors, summands = _factors(own, name), [_factors(layer, each) for each in names]
    if factors is None or None in summands:
        return None
    down, up = factors
    assigned, start = [], 0
    for each, (a, b) in zip(names, (s for s in summands if s is not None), strict=True):
        factor = shares[each] * layer.scaling[each] / own.scaling[name]
        rows = slice(start, start + len(a))
        assigned += [(down[rows], a), (up[:, rows], b if factor == 1 else factor * b.double())]
        start = rows.stop
    return None if start > len(down) else [*assigned, (up[:, start:], torch.zeros_like(up[:, start:]))]


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
    """The weights A `[r, …]` and B `[…, r, …]` of a layer's adapter; None if it has more than these two."""
    weights = _weights(layer, name) if isinstance(layer, LoraLayer) else []
    if tuple(key for key, _ in weights) not in _FACTORS:
        return None
    (_, down), (_, up) = weights
    return down, up


def _weights(layer: Any, name: str) -> list[tuple[str, Tensor]]:
    """The weights of a layer's adapter, each with the attribute of the layer that it is in."""
    found = [(attribute, getattr(layer, attribute)) for attribute in layer.adapter_layer_names]
    return [
        (attribute, weight.detach())
        for attribute, adapters in found
        if name in adapters
        for weight in ([adapters[name]] if isinstance(adapters[name], Tensor) else adapters[name].parameters())
    ]
