"""Sampled or greedy completions of a batch of prompts, independent of the checkpoint's `generation_config`.

A checkpoint may ship its own (Qwen2.5's sets temperature, top-k, top-p and a repetition penalty), and `generate` takes
every field from it that the caller does not set. Rollouts and evaluation must not depend on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from logitmix.mixture.base import MixtureBase
from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.decoding.ends import CompletionEnds
from logitmix.mixture.decoding.loop import Decoding, MixtureGenerateOutput, validate_decoding
from logitmix.mixture.decoding.support import SequenceSupport, SupportRecorder
from logitmix.mixture.padding import left_pad
from logitmix.mixture.tokenizers import (
    chat_template_errors,
    declared_ends,
    end_token_ids,
    leave_texts_open,
    validate_chat_template,
    validate_no_chat_template_kwargs,
)
from logitmix.tasks.templates import Prompt

GREEDY: dict[str, Any] = {"do_sample": False}


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    settings: dict[str, Any],
    stop_strings: Sequence[str] | str = (),
    decoding: Decoding = "joint",
    statistics: DecodingStatistics | None = None,
    on_completion: Callable[[int, list[int]], None] | None = None,
    supports: list[SequenceSupport] | None = None,
    **model_kwargs: Any,
) -> list[list[int]]:
    """The completion of each prompt as token ids, up to and including EOS or the token that completes a stop string.

    Args:
        settings: fields of `GenerationConfig` (`max_new_tokens`, `do_sample`, `temperature`, …). Others have the
            defaults of transformers; of the checkpoint's `generation_config` only the EOS tokens are kept.
        stop_strings: texts, or one text, that end a completion as EOS does; the completion contains them.
        decoding: of a mixture, as `LogitMixForCausalLM.generate` takes it; other models have joint decoding alone.
        statistics: the passes and drafts are added to it, unless all of the decoding was left to transformers.
        on_completion: called once for each completion, with the index of its prompt and its ids: when it has ended
            with EOS or a stop string, while others continue, else at the end.
        supports: a list to which is appended, for each completion, which tokens could have been drawn at each of its
            tokens. For joint decoding that samples.
        model_kwargs: arguments of the model's forward, for example `alpha=` of a mixture.

    Completions contain no padding, even if the padding token is also the EOS token. Raises `ValueError` for another
    `decoding`, and for what alternating decoding, if chosen, cannot do.
    """
    validate_decoding(model, decoding)
    if isinstance(model, MixtureBase):
        model_kwargs |= {"decoding": decoding}
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    eos_token_ids = settings.get("eos_token_id")
    if eos_token_ids is None:
        eos_token_ids = get_eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    recorder = None if supports is None else SupportRecorder(settings)
    settings = settings if recorder is None else recorder.settings
    config = GenerationConfig(
        **({"pad_token_id": pad_token_id} | settings | {"eos_token_id": eos_token_ids}),
        disable_compile=True,
        return_dict_in_generate=decoding != "joint",
    )
    input_ids, attention_mask = left_pad(prompt_ids, pad_token_id, model.device)
    P, completions = input_ids.shape[1], dict[int, list[int]]()

    def report(i: int, ids: list[int]) -> None:
        completions[i] = ids
        if on_completion is not None:
            on_completion(i, ids)

    stop = _stop_criterion(tokenizer, tuple(stop_strings)) if stop_strings else None
    eos = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
    with default_generation_config(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([CompletionEnds(P, eos, stop, report)]),
            logits_processor=LogitsProcessorList([] if recorder is None else [recorder]),
            **model_kwargs,
        )
    if statistics is not None and isinstance(output, MixtureGenerateOutput) and output.statistics is not None:
        statistics.add(output.statistics)
    sequences = output if isinstance(output, Tensor) else output.sequences
    for i, ids in enumerate(sequences[:, P:].tolist()):
        if i not in completions:
            report(i, ids)
    if supports is not None and recorder is not None:
        supports += recorder.supports([len(completions[i]) for i in range(len(input_ids))])
    return [completions[i] for i in range(len(input_ids))]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The token ids of each prompt, a text or the messages of a chat.

    Messages are rendered by the chat template, up to the assistant's turn, with `chat_template_kwargs`. The prompts
    are all texts or all messages, as in TRL. Raises `ValueError` for messages that the tokenizer's chat template, if
    it has one, cannot render, and for `chat_template_kwargs` that nothing reads.
    """
    kwargs = chat_template_kwargs or {}
    if all(isinstance(prompt, str) for prompt in prompts):
        validate_no_chat_template_kwargs(kwargs)
        return leave_texts_open(tokenizer)(list(prompts))["input_ids"]
    validate_chat_template(tokenizer, kwargs)
    with chat_template_errors(tokenizer):
        rendered = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, return_dict=True, **kwargs
        )  # fmt: skip
    return rendered["input_ids"]


def get_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS, the chat template's, and the generation config's.

    Of a mixture, the generation configs of all members count: otherwise it would run past the end that an anchor
    writes. The chat template of a base model's tokenizer may end turns with another token than EOS (Qwen2.5's does),
    which a model fine-tuned on chats then writes.
    """
    ends = end_token_ids(tokenizer)
    for declaring in (model, *getattr(model, "members", ())):
        ends += declared_ends(declaring)
    return list(dict.fromkeys(ends))


def validate_stop_strings(tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> None:
    """Raise `ValueError` for a stop string that no tokens of the tokenizer spell, so that it would never be met.

    An empty one, which every text contains, is refused too.
    """
    for stop in stop_strings:
        if not stop:
            raise ValueError(
                "a stop string is empty, so it would end each completion at its first token; leave it out"
            )
        try:
            _stop_criterion(tokenizer, (stop,))
        except ValueError as error:
            raise ValueError(
                f"the stop string {stop!r} would never be met: the tokenizer of {tokenizer.name_or_path!r} has no "
                "tokens that spell it; choose another, or leave it out"
            ) from error


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's `generation_config` by the defaults of transformers within the context."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@lru_cache(maxsize=8)
def _stop_criterion(tokenizer: PreTrainedTokenizerBase, stop_strings: tuple[str, ...]) -> StopStringCriteria:
    """Cached: building one reads every token of the vocabulary, which takes half a second for Qwen's."""
    return StopStringCriteria(tokenizer, list(stop_strings))
