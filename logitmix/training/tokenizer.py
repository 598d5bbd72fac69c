"""The tokenizer of a training run, as its prompts and rewards need it."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.generation import validate_stop_strings
from logitmix.mixture.loading import require_tokenizer, validate_padding, validate_same_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.tokenizers import keep_tags, leave_texts_open
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.rewards import TaskReward


def prepare_tokenizer(
    given: Any, model: PreTrainedModel, source: str | None, args: LogitMixGRPOConfig, reward_funcs: Any
) -> Any:
    """The processing class given, whose tokenizer must be the mixture's, or the model's own tokenizer.

    `source` is where the model was loaded from, if it was. The tokenizer appends nothing to prompts and keeps the tags
    that a task's reward reads.

    Raises `ValueError` for another tokenizer than the members', one that cannot pad, and a stop string that it cannot
    spell.
    """
    own = model.tokenizer if isinstance(model, LogitMixForCausalLM) else None
    policy = model.policy if isinstance(model, LogitMixForCausalLM) else model
    if given is None:
        given = own or require_tokenizer(
            source or policy.name_or_path,
            padding_side="left",
            truncation_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    elif own is not None:
        validate_same_tokenizer([given, own])
    # also of a processor of several modalities
    tokenizer: PreTrainedTokenizerBase = getattr(given, "tokenizer", given)
    validate_padding(tokenizer)
    leave_texts_open(tokenizer)
    if not args.use_vllm:
        validate_stop_strings(tokenizer, args.stop_strings or [])
    for reward in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(reward, TaskReward):
            keep_tags(tokenizer, reward.task.template)
    return given
