"""`logitmix realign`: the KL penalties that alphas correspond to, and expected rates, from rollouts at one alpha."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitmix.cli.options.data import TestProblemArguments, read_run_arguments
from logitmix.cli.options.model import AnchorArguments, MixtureArguments, ModelArguments, load_mixture
from logitmix.cli.options.parser import parse
from logitmix.cli.options.validation import validate_at_least
from logitmix.runs.console import console

if TYPE_CHECKING:  # `--help` needs no torch
    from logitmix.evaluation.decode import Decoder
    from logitmix.mixture.configuration import LogitMixConfig


DEFAULT_ALPHA = 0.5


@dataclass
class RealignArguments:
    """Realignment"""

    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the anchor at which the rollouts are sampled; default: the checkpoint's if its weights "
            "sum to 1, or 0.5."
        },
    )
    alphas: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)], metadata={"help": "Weights to predict."}
    )
    beta: float = field(
        default=1.0, metadata={"help": "Strength of the KL to the anchor that the policy was trained with."}
    )
    trained_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the anchor in that training; default: the checkpoint's if logitmix train made it, else "
            "0, for a policy trained alone."
        },
    )
    kl_budget: float | None = field(
        default=None, metadata={"help": "Find the smallest alpha within this KL to the anchor, in nats a token."}
    )
    num_samples: int = field(default=4, metadata={"help": "Rollouts of each problem, sampled at temperature 1."})
    seed: int = field(default=0, metadata={"help": "Seed of the rollouts."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest rollout, in tokens; default: 512, or what the context leaves if that is less."},
    )
    batch_size: int = field(default=64, metadata={"help": "Number of rollouts sampled at a time."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the numbers; default: none."})

    def __post_init__(self) -> None:
        validate_at_least(self, num_samples=1, batch_size=1)
        for alpha in (self.alpha, *self.alphas):
            if alpha is not None and not 0 <= alpha <= 1:
                raise ValueError(f"alpha {alpha:g} is not from 0, the policy alone, to 1, the anchor alone")
        if self.output_file is not None and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file} is in no folder; give a file in a folder that exists")
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise ValueError(f"--output_file {self.output_file} is a folder; give a file in it")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ValueError(f"kl_budget is {self.kl_budget}, but must be above 0; only the anchor itself has none")


@dataclass
class RealignOptions:
    realignment: RealignArguments
    problems: TestProblemArguments
    model: ModelArguments
    mixture: AnchorArguments


def main(argv: Sequence[str]) -> None:
    description = (
        "From one set of rollouts, predict rates and divergences of a geometric mixture at other alphas, and say "
        "which strength of a KL penalty each corresponds to."
    )
    run(parse("realign", description, RealignOptions, argv))


def load_decoder(options: RealignOptions) -> Decoder:
    """What samples rollouts from the mixture, on the problems, at temperature 1."""
    from logitmix.evaluation.decode import make_decoder
    from logitmix.evaluation.realignment import validate_geometric
    from logitmix.mixture.loading import require_tokenizer

    args, source = options.realignment, options.model.model_name_or_path
    task = options.problems.resolve(source, options.mixture.anchor).load()
    problems = task.problems("test", options.problems.eval_limit)
    model = load_mixture(options.model, MixtureArguments(options.mixture.anchor))
    validate_geometric(model.config)
    tokenizer = require_tokenizer(source)
    return make_decoder(model, tokenizer, task, problems, args.max_new_tokens, temperature=1.0, seed=args.seed)


def own_alpha(config: LogitMixConfig) -> float | None:
    """The mixture's own alpha; None for weights that no alpha from 0 to 1 gives, as of a product."""
    from logitmix.mixture.mixing import weights_to_alpha

    alpha = weights_to_alpha(config.weights)
    return alpha if alpha is not None and 0 <= alpha <= 1 else None


def is_trained_mixture(options: RealignOptions) -> bool:
    """Whether the policy was trained within the mixture that is realigned, by `logitmix train`."""
    arguments = read_run_arguments(options.model.model_name_or_path)
    return options.mixture.anchor is None and arguments is not None and arguments.get("command") == "train"


def run(options: RealignOptions) -> None:
    from logitmix.evaluation.realignment import predict, sample_rollouts
    from logitmix.evaluation.report.tables import print_predictions
    from logitmix.mixture.realignment import equivalent_beta

    args = options.realignment
    for alpha in args.alphas:  # refuses beta and alphas before anything is loaded
        equivalent_beta(args.beta, alpha, args.trained_alpha or 0.0)
    decoder = load_decoder(options)
    saved_alpha, trained_alpha = own_alpha(decoder.model.config), args.trained_alpha
    if trained_alpha is None:
        trained_alpha = saved_alpha if saved_alpha is not None and is_trained_mixture(options) else 0.0
    betas = [equivalent_beta(args.beta, alpha, trained_alpha) for alpha in args.alphas]
    sampled_alpha = next(alpha for alpha in (args.alpha, saved_alpha, DEFAULT_ALPHA) if alpha is not None)
    rollouts = sample_rollouts(decoder, sampled_alpha, args.num_samples, args.batch_size)
    predictions, budget_alpha = predict(decoder.model, rollouts, args.alphas, args.kl_budget)
    title = f"{decoder.task.name}, predicted from {len(rollouts.responses)} rollouts at alpha {sampled_alpha:g}"
    trained = f"beta {args.beta:g} at alpha {trained_alpha:g}"
    print_predictions(f"{title} and temperature 1", predictions, betas, trained)
    if budget_alpha is not None:
        print(f"The smallest alpha within {args.kl_budget:g} nats a token of the anchor is {budget_alpha:.3f}.")
    if args.output_file is not None:
        rows = [asdict(p) | {"beta": b if p.alpha < 1 else None} for p, b in zip(predictions, betas, strict=True)]
        numbers: dict[str, Any] = {
            "rollouts": len(rollouts.responses),
            "alpha": sampled_alpha,
            "trained_alpha": trained_alpha,
        }
        numbers |= {"kl_budget_alpha": budget_alpha}
        Path(args.output_file).write_text(json.dumps(numbers | {"predictions": rows}, indent=2) + "\n")
        console.print(f"The numbers are in {args.output_file}.", soft_wrap=True)
