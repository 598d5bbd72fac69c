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

_MOST_PADDING = 1.25  # how many times their tokens prompts may take to be read in one pass
# tokens of one pass for several members: with more, reading the weights once saves little, and takes memory
_MOST_TOKENS = 512
_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer}


def passes(
    config: LogitMixConfig,
    inputs: Mapping[str, PassInputs],
    prompts: MemberPrompts | None,
    cache: Cache | None,
    arguments: Mapping[str, Any],
    may_fold: bool = True,
) -> tuple[list[list[str]], dict[str, PassInputs]]:
    """The members of each pass, and what they read.

    Members that are one model run together if only their prompts differ, except that long prompts, and prompts of very
    different lengths, are read one after another. A pass with gradients has one member, the policy. `arguments` are
    others of the pass, which may ask for outputs of one member. A cache that is filled outside `generate` does not
    tell where the prompts end. How many passes these rules give depends on the prompts of a batch; without `may_fold`
    every member has its own.
    """
    alone = [[name] for name in inputs]
    if prompts is None or not may_fold or torch.is_grad_enabled():
        return alone, dict(inputs)
    if cache is not None and (
        prompts.prompt_width is None or cache.offloading or {*map(type, cache.layers)} - _LAYERS
    ):
        return alone, dict(inputs)
    if any(value is not None and value is not False for value in arguments.values()):
        return alone, dict(inputs)
    by_model: dict[tuple[str, str], list[str]] = {}
    for name in inputs:
        adapter = "" if config.runs_without_adapter(name) else name
        by_model.setdefault((config.model_of(name), adapter), []).append(name)
    groups, aligned = [], dict(inputs)
    for members in by_model.values():
        widths = [prompts.width_of(name, inputs[name].input_ids.shape[1]) for name in members]
        has_static = cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)
        if has_static or len(members) * max(widths) <= _MOST_PADDING * sum(widths):
            aligned |= align(inputs, members)
            num_tokens = sum(aligned[name].input_ids.numel() for name in members)
            groups += [members] if num_tokens <= _MOST_TOKENS else [[name] for name in members]
        elif all(inputs[name].reads_prompt for name in members):
            groups += [[name] for name in members]
        else:
            groups.append(members)
    return groups, aligned


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
    names = [str(i) for i in range(len(inputs))]
    aligned = align(dict(zip(names, inputs, strict=True)), names).values()
    fields = ("input_ids", "attention_mask", "position_ids")
    rows: dict[str, Any] = {name: torch.cat([vars(each)[name] for each in aligned]) for name in fields}
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
        return _stack(keys), _stack(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._longest.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return self._longest.get_seq_length()

    def get_max_length(self) -> int:
        return self._longest.get_max_length()

    @property
    def _longest(self) -> CacheLayerMixin:
        return max(self.layers, key=lambda layer: int(layer.get_seq_length()))


def _stack(states_BHTD: Sequence[Tensor]) -> Tensor:
    """The rows of all members, with zeros, which the mask excludes, before those of fewer tokens."""
    T = max(states.shape[2] for states in states_BHTD)
    if all(states.shape[2] == T for states in states_BHTD):
        return torch.cat(list(states_BHTD))
    B, H, _, D = states_BHTD[0].shape
    rows = states_BHTD[0].new_zeros(len(states_BHTD), B, H, T, D)
    for row, states in zip(rows, states_BHTD, strict=True):
        row[:, :, T - states.shape[2] :] = states
    return rows.flatten(0, 1)
