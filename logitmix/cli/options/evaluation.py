"""Flags of evaluations, during training and after it."""

from dataclasses import dataclass, field
from typing import Literal

from logitmix.cli.options.validation import validate_at_least


@dataclass
class EvaluationArguments:
    """What a training run evaluates and writes as it goes, and where its validation questions come from."""

    eval_every: int | None = field(
        default=None, metadata={"help": "Updates between greedy evaluations on test problems; default none."}
    )
    validation_source: Literal["held_out", "train"] = field(
        default="held_out",
        metadata={
            "help": "Questions of an alpha_controller that validates: the last of the train split, left out of "
            "training; or fresh training questions after each outer step, left out of training in that pass."
        },
    )
    num_completions_to_save: int = field(
        default=64, metadata={"help": "Completions of each outer step to write to completions.jsonl; 0: none."}
    )

    def __post_init__(self) -> None:
        validate_at_least(self, eval_every=1, num_completions_to_save=0)


@dataclass
class DecodingArguments:
    """How responses are decoded, and where they are written."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest response in tokens; default 512, or what the context leaves."}
    )
    batch_size: int = field(default=64, metadata={"help": "Responses to decode at a time."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for every response; repeat the command to continue after an interruption."},
    )


@dataclass
class SamplingArguments:
    """Several samples a problem, for avg@k and pass@k."""

    num_samples: int = field(default=1, metadata={"help": "Responses to each problem; above 1 set --temperature."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
