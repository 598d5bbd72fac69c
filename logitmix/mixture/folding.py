"""Members that are one model without adapters read their prompts in one pass over its weights.

Shape legend: M members of one model, B sequences, T tokens. Row m B + b of the pass is sequence b of member m.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.member_prompts import MemberPrompts, PassInputs
from logitmix.mixture.padding import position_ids_from_mask

_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer}


def passes(
    config: LogitMixConfig,
    active: Sequence[str],
    prompts: MemberPrompts | None,
    cache: Cache | None,
    arguments: Mapping[str, Any],
) -> list[list[str]]:
    """The members of each pass: those that are one model together, if only their prompts differ.

    A pass with gradients has one member, the policy. `arguments` are others of the pass, which may ask for outputs of
    one member. A cache that is filled outside `generate` does not tell where the prompts end.
    """
    together = prompts is not None and not torch.is_grad_enabled()
    if cache is not None:
        together = together and prompts is not None and prompts.prompt_width is not None
        together = together and not cache.offloading and {type(layer) for layer in cache.layers} <= _LAYERS
    if not together or any(value is not None and value is not False for value in arguments.values()):
        return [[name] for name in active]
    groups: dict[tuple[str, str], list[str]] = {}
    for name in active:
        is_plain = config.runs_without_adapter(name)
        groups.setdefault((config.model_of(name), "" if is_plain else name), []).append(name)
    return list(groups.values())


def align(inputs: Mapping[str, PassInputs], members: Sequence[str]) -> dict[str, PassInputs]:
    """The inputs of members of one pass, padded on the left to one width, with masks and positions."""
    tokens = max(inputs[name].input_ids.shape[1] for name in members)
    masks = {name: _mask_of(inputs[name]) for name in members}
    width = max(mask.shape[1] for mask in masks.values())
    aligned = {}
    for name in members:
        ids, positions = inputs[name].input_ids, inputs[name].position_ids
        if positions is None:
            positions = position_ids_from_mask(masks[name])[:, -ids.shape[1] :]
        short = tokens - ids.shape[1]
        aligned[name] = PassInputs(
            nn.functional.pad(ids, (short, 0)),
            nn.functional.pad(masks[name], (width - masks[name].shape[1], 0)),
            nn.functional.pad(positions.expand(len(ids), -1), (short, 0)),
        )
    return aligned


def _mask_of(inputs: PassInputs) -> Tensor:
    assert inputs.attention_mask is not None, "MemberPrompts.inputs gives every member one"
    return inputs.attention_mask


def run_together(
    run: nn.Module, inputs: Sequence[PassInputs], caches: Sequence[Cache | None], arguments: Mapping[str, Any]
) -> list[Any]:
    """The output of each member from one pass of their model, or of its decoder."""
    fields = ("input_ids", "attention_mask", "position_ids")
    rows: dict[str, Any] = {name: torch.cat([vars(each)[name] for each in inputs]) for name in fields}
    layers = [cache.layers for cache in caches if cache is not None]
    if layers:
        rows["past_key_values"] = Cache(layers=[FoldedLayer(each) for each in zip(*layers, strict=True)])
    output, count = run(**rows, **arguments), len(inputs)
    if getattr(output, "logits", None) is not None:
        return [CausalLMOutputWithPast(logits=part) for part in output.logits.chunk(count)]
    return [BaseModelOutputWithPast(last_hidden_state=part) for part in output.last_hidden_state.chunk(count)]


class FoldedLayer(CacheLayerMixin):
    """One layer of the cache of a pass: the layers of its members, each of which holds the member's own rows."""

    def __init__(self, layers: Sequence[CacheLayerMixin]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.is_sliding = layers[0].is_sliding
        self.is_compileable = layers[0].is_compileable

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Each member's layer initialises itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        count = len(self.layers)
        rows = zip(self.layers, key_states.chunk(count), value_states.chunk(count), strict=True)
        keys, values = zip(*[layer.update(k, v, *args, **kwargs) for layer, k, v in rows], strict=True)
        return torch.cat(keys), torch.cat(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.layers[0].get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return self.layers[0].get_seq_length()

    def get_max_length(self) -> int:
        return self.layers[0].get_max_length()
