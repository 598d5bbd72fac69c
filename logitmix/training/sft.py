"""The rows that make an anchor: demonstrations, none of which is cut."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def sft_dataset(
    rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Dataset, int]:
    """Rows of `prompt` and `completion` for TRL's `SFTTrainer`, and how many were left out as too long.

    `SFTTrainer` cuts a row at `max_length` tokens. A demonstration cut before its answer teaches a model not to
    answer, so such rows are dropped instead.

    Raises `ValueError` where no row is left.
    """
    if not rows:
        raise ValueError("the data set is empty; SFT needs at least one demonstration")
    lengths = [len(ids) for ids in tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]]
    # one token more: the end-of-sequence token that TRL adds
    kept = [row for row, n in zip(rows, lengths, strict=True) if max_length is None or n + 1 <= max_length]
    if not kept:
        raise ValueError(
            f"every demonstration is longer than max_length {max_length} (the shortest has {min(lengths)} tokens); "
            "raise --max_length"
        )
    return Dataset.from_list(kept), len(rows) - len(kept)
