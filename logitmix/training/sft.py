"""Supervised fine-tuning of an anchor, on demonstrations that are never truncated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from logitmix.mixture.tokenizers import (
    chat_template_errors,
    leave_texts_open,
    validate_chat_template,
    validate_no_chat_template_kwargs,
)
from logitmix.training.checkpointing.resume import Checkpointing
from logitmix.training.resumable_config import ResumableConfig
from logitmix.training.trl_patches import PatchedSFTTrainer


@dataclass
class ResumableSFTConfig(ResumableConfig, SFTConfig):
    """TRL's `SFTConfig`, with what `ResumableConfig` adds."""


class ResumableSFTTrainer(PatchedSFTTrainer):
    """TRL's `SFTTrainer` with exact resume: a resumed run matches an uninterrupted one bit for bit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpointing = Checkpointing(self)


def sft_dataset(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, int]:
    """Rows of `prompt` and `completion` for TRL's `SFTTrainer`, and the number of rows dropped as too long.

    Both columns are texts, or both are messages, which the tokenizer's chat template renders, with the arguments of a
    third column `chat_template_kwargs` if there is one.

    `SFTTrainer` truncates rows at `max_length` tokens. A demonstration truncated before its answer teaches a model
    not to answer, so such rows are dropped instead.

    Raises `ValueError` where no row is left, and for messages that the chat template cannot render.
    """
    if not rows:
        raise ValueError("the data set is empty; SFT needs at least one demonstration")
    whole = [row["prompt"] + row["completion"] for row in rows]
    kwargs = [row.get("chat_template_kwargs") or {} for row in rows]
    if isinstance(whole[0], str):
        validate_no_chat_template_kwargs(kwargs[0])
        # plus the end-of-sequence token that TRL adds
        lengths = [len(ids) + 1 for ids in leave_texts_open(tokenizer)(whole)["input_ids"]]
    else:
        validate_chat_template(tokenizer, kwargs[0])
        with chat_template_errors(tokenizer):
            rendered = [
                tokenizer.apply_chat_template(chat, return_dict=True, **own)
                for chat, own in zip(whole, kwargs, strict=True)
            ]
        lengths = [len(chat["input_ids"]) for chat in rendered]
    kept = [row for row, n in zip(rows, lengths, strict=True) if max_length is None or n <= max_length]
    if not kept:
        raise ValueError(
            f"every demonstration is longer than max_length {max_length} (the shortest has {min(lengths)} tokens); "
            "raise --max_length"
        )
    return Dataset.from_list(kept), len(rows) - len(kept)
