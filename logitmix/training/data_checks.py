"""Checks of what a run trains on: enough questions, texts that the policy reads, and prompts that fit its context."""

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin
from trl import GRPOTrainer

from logitmix.mixture.context import context_length, validate_fits_context


def validate_data(trainer: GRPOTrainer, validation_dataset: Dataset | None) -> None:
    """Raise `ValueError` for data sets that the run cannot train or validate on.

    Prompts of a stream or an environment are checked as they are sampled from, by `validate_lengths`.
    """
    validate_train_size(trainer)
    validate_prompts_fit(trainer, trainer.train_dataset)
    validate_prompts_fit(trainer, validation_dataset, "validation prompt")


def validate_train_size(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` where an outer step needs more questions than there are: TRL would take no step at all."""
    if trainer.args.dynamic_sampling == "refill" and not isinstance(trainer.train_dataset, Dataset):
        raise ValueError(
            f"dynamic_sampling='refill' draws questions from anywhere in the data set, which a "
            f"{type(trainer.train_dataset).__name__} does not allow; use a Dataset, or 'filter'"
        )
    needed = trainer.args.generation_batch_size // trainer.num_generations
    if isinstance(trainer.train_dataset, Dataset) and len(trainer.train_dataset) < needed:
        raise ValueError(
            f"the data set has {len(trainer.train_dataset)} questions, fewer than the {needed} of an outer step "
            f"(generation_batch_size {trainer.args.generation_batch_size} / num_generations "
            f"{trainer.num_generations}); use smaller batches or more data"
        )


def validate_no_images(trainer: GRPOTrainer, rows: Iterable[Mapping[str, Any]], name: str = "row") -> None:
    """Raise `ValueError` for a row with an image where the policy reads text only."""
    if isinstance(trainer.processing_class, ProcessorMixin):
        return
    for i, row in enumerate(rows):
        messages = row["prompt"] if isinstance(row.get("prompt"), list) else []
        parts = [
            part
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            if isinstance(part, dict)
        ]
        if "image" in row or row.get("images", []) != [] or any(part.get("type") == "image" for part in parts):
            raise ValueError(
                f"{name} {i} has an image, but the policy reads text only; remove the column or part, or train on text"
            )


def validate_prompts_fit(trainer: GRPOTrainer, dataset: Any, name: str = "prompt") -> None:
    """Raise `ValueError` where a prompt of the data set holds an image, or exceeds the context with its completion."""
    if not isinstance(dataset, Dataset) or trainer.environment_factories is not None:
        return
    columns = [column for column in ("prompt", "image", "images") if column in dataset.column_names]
    validate_no_images(trainer, dataset.select_columns(columns), f"the {name} of row")
    for start in range(0, len(dataset), 1000):
        prompts = dataset[start : start + 1000]["prompt"]
        validate_lengths(trainer, trainer.tokenize_prompts(prompts), name, start)


def validate_lengths(trainer: GRPOTrainer, prompt_ids: list, name: str = "prompt", start: int = 0) -> None:
    """Raise `ValueError` where a prompt, counted from `start`, and its completion exceed the context."""
    context = context_length(trainer.model.config)
    for offset, ids in enumerate(prompt_ids if context is not None else []):
        validate_fits_context(
            context, len(ids), trainer.max_completion_length, f"{name} {start + offset}", "max_completion_length"
        )
