"""Distillation by supervised fine-tuning on the mixture's right samples: its configuration, and what it refuses."""

from collections.abc import Sequence
from dataclasses import fields

from transformers import PreTrainedModel

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.distillation import LogitMixDistillationConfig
from logitmix.training.sft import ResumableSFTConfig
from logitmix.training.students import validate_vocabulary

# Options of a distillation that SFT has not, but the samples of the mixture have
_OF_SAMPLES = {"max_completion_length", "temperature", "decoding", "chat_template_kwargs"}
_OWN_DEFAULTS = {"remove_unused_columns"}  # SFT drops the columns that it has tokenized, a distillation reads them


def sft_config(args: LogitMixDistillationConfig) -> ResumableSFTConfig:
    """The configuration of TRL's SFT trainer with the training arguments of a distillation; no row is truncated.

    Raises `ValueError` for an option that only the on-policy method reads.
    """
    of_sft = {f.name for f in fields(ResumableSFTConfig) if f.init}
    own = {f.name: f.default for f in fields(LogitMixDistillationConfig) if f.init}
    for name in sorted(own.keys() - of_sft - _OF_SAMPLES):
        value = getattr(args, name)
        if value != own[name]:
            raise ValueError(
                f"{name} is {value!r}, but method sft, which trains by SFT on samples of the mixture, does not read "
                "it; leave it out, or use --method on_policy"
            )
    shared = (own.keys() & of_sft) - _OWN_DEFAULTS
    return ResumableSFTConfig(**{name: getattr(args, name) for name in shared}, max_length=None)


def validate_sft_student(
    student: PreTrainedModel, mixture: LogitMixForCausalLM, prompt_ids: Sequence[list[int]], max_completion_length: int
) -> None:
    """Raise `ValueError` for a student of fewer tokens than the mixture, and for prompts that leave no room in it."""
    validate_vocabulary(student, mixture)
    context = context_length(student.config)
    for i, ids in enumerate(prompt_ids):
        validate_fits_context(context, len(ids), max_completion_length, f"prompt {i}", "max_completion_length")
