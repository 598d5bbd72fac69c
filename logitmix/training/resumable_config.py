"""What the configurations of SFT, GRPO and distillation add to TRL's alike."""

from dataclasses import dataclass, field
from typing import Any

from logitmix.training.option_types import set_types


@dataclass
class ResumableConfig:
    """A mixin of TRL's configurations: an option to resume, and values of the types that their fields declare.

    It is no `TrainingArguments` itself, whose defaults would then replace TRL's.

    Args:
        resume_without_optimizer: resume from a checkpoint that has none (`save_only_model`), with a new optimizer and
            schedule. Otherwise such a checkpoint is refused.

    Raises `ValueError` for a value of another type, as `option_types.typed` says, and for 0 updates.
    """

    resume_without_optimizer: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint of --save_only_model, with a new optimizer and schedule."},
    )

    def __post_init__(self) -> None:
        set_types(self)
        super().__post_init__()  # type: ignore[misc]  # of TRL's configuration
        validate_max_steps(self)


def validate_max_steps(args: Any) -> None:
    """Raise `ValueError` for 0 updates."""
    if args.max_steps == 0:  # transformers would use num_train_epochs instead
        raise ValueError("max_steps is 0; it must be above 0, or -1 to train for num_train_epochs")
