"""The arguments of `generate` where members read different prompts."""

from collections.abc import Mapping
from typing import Any

from transformers.generation import GenerationMode

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.member_prompts import MemberPrompts, Prompts, read_prompts
from logitmix.mixture.padding import left_pad

# The others reread or remove tokens of the policy's cache, whose number differs between members
MODES_WITH_MEMBER_PROMPTS = (
    *(GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
    *(GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE),
)


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
    config = kwargs.get("generation_config") or model.generation_config
    names = ("pad_token_id", "eos_token_id", "max_new_tokens")
    pad, eos, new_tokens = (kwargs[name] if name in kwargs else getattr(config, name, None) for name in names)
    if new_tokens is None and kwargs.get("max_length") is not None and input_ids is not None:
        new_tokens = max(kwargs["max_length"] - input_ids.shape[1], 0)
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
    checked = MemberPrompts.of(prompts, model.config, input_ids, tokenizer, padding, new_tokens or 0)
    assert input_ids is not None
    return args, kwargs | {"member_prompts": checked.with_prompt_width(input_ids.shape[1])}
