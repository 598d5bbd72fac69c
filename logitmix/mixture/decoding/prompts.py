"""The arguments of `generate` where members read different prompts."""

from collections.abc import Mapping
from typing import Any

from transformers.generation import GenerationMode

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.context import context_length
from logitmix.mixture.member_prompts import MemberPrompts, Prompts, read_prompts
from logitmix.mixture.padding import left_pad

# The others reread or remove tokens of the policy's cache, whose number differs between members
MODES_WITH_MEMBER_PROMPTS = (
    *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
    *(GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE),
)

_DEFAULT_NEW_TOKENS = 20


def with_member_prompts(
    model: MixtureBase, prompts: Mapping[str, Prompts], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate` with the prompts of members, checked; `input_ids` default to the policy's prompt.

    Raises `ValueError` as `MemberPrompts.of`, and for a KV cache that holds tokens.
    """
    input_ids = next(
        (ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if ids is not None), None
    )
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("member_prompts cannot be used with a KV cache that holds tokens; leave out past_key_values")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("member_prompts need input_ids, not inputs_embeds: the members have different embeddings")
    pad, eos = (_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    tokenizer = kwargs.get("tokenizer", model.tokenizer)
    # as for input_ids: a padding token that is EOS as well may be part of a text
    padding = None if pad in (eos if isinstance(eos, (list, tuple)) else [eos]) else pad
    if input_ids is None and isinstance(prompts, Mapping) and "policy" in prompts:
        prompts = dict(prompts)
        rows = read_prompts(prompts.pop("policy"), "policy", tokenizer, padding)
        if not all(rows):
            raise ValueError("the prompt of policy is empty; it needs at least one token, such as BOS")
        input_ids, mask = left_pad(rows, pad or 0, model.device)
        kwargs = kwargs | {"input_ids": input_ids, "attention_mask": mask}
    new_tokens = 0 if input_ids is None else _new_tokens(model, kwargs, input_ids.shape[1])
    checked = MemberPrompts.of(prompts, model.config, input_ids, tokenizer, padding, new_tokens)
    assert input_ids is not None
    return args, kwargs | {"member_prompts": checked.with_prompt_width(input_ids.shape[1])}


def _setting(model: MixtureBase, kwargs: Mapping[str, Any], name: str) -> Any:
    """The value that `generate` uses: the argument's, else that of `generation_config=`, else the model's own."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _new_tokens(model: MixtureBase, kwargs: Mapping[str, Any], prompt_tokens: int) -> int:
    """How many tokens `generate` writes at most, after prompts of this many tokens."""
    new_tokens, length = (_setting(model, kwargs, name) for name in ("max_new_tokens", "max_length"))
    if new_tokens is not None:
        return int(new_tokens)
    if length is not None:
        return max(int(length) - prompt_tokens, 0)
    # the default of transformers, up to the context that the members share
    room = context_length(model.config)
    return _DEFAULT_NEW_TOKENS if room is None else max(min(_DEFAULT_NEW_TOKENS, room - prompt_tokens), 0)
