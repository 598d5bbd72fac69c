"""Flags for evaluation, of checkpoints and during training."""

from dataclasses import dataclass, field
from typing import Literal

from logitmix.cli.options.validation import validate_at_least

Decoding = Literal["auto", "joint", "alternating"]  # of logitmix.mixture.decoding.loop, which needs torch
DECODING_HELP = (
    "Of a mixture: joint runs all members for each token, alternating draws from the same distribution in fewer "
    "passes, auto chooses the cheaper at every step."
)


@dataclass
class DecodingArguments:
    """Decoding"""

    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest response, in tokens; default: 512, or what the context leaves if that is less."},
    )
    batch_size: int = field(default=64, metadata={"help": "Number of responses decoded at a time."})
    decoding: Decoding = field(default="auto", metadata={"help": DECODING_HELP})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for every response; the same command again continues an interrupted evaluation."},
    )


@dataclass
class SamplingArguments:
    """Sampling, for avg@k and pass@k"""

    num_samples: int = field(
        default=1, metadata={"help": "Responses to each problem; more than 1 needs a --temperature above 0."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 decodes greedily."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})


@dataclass
class EvaluationArguments:
    """Evaluation during training"""

    eval_every: int | None = field(
        default=None, metadata={"help": "Updates between greedy evaluations on the test problems; default: none."}
    )
    validation_source: Literal["held_out", "train"] = field(
        default="held_out",
        metadata={
            "help": "Validation questions of an --alpha_controller that validates. held_out: the last of the train "
            "split, never trained on; train: fresh training questions at each step, not trained on in that epoch."
        },
    )
    num_completions_to_save: int = field(
        default=64, metadata={"help": "Completions of each outer step saved to completions.jsonl with their rewards."}
    )

    def __post_init__(self) -> None:
        validate_at_least(self, eval_every=1, num_completions_to_save=0)
