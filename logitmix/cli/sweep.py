"""`logitmix sweep`: a pair at each alpha, mixed in logits, probabilities and weights (the paper's table 4)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments
from logitmix.cli.options.mixture import MixtureArguments, open_mixture, open_tokenizer
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import parse
from logitmix.evaluation.decode import Decode, Request, Response, decoder, in_batches, requests_for
from logitmix.evaluation.report.figures import plot_sweep
from logitmix.evaluation.report.tables import print_choices, print_sweep_intervals
from logitmix.evaluation.responses import open_responses
from logitmix.evaluation.sweep import MEMBERS, MIXES, choose_alpha, merge_weights, set_merge, sweep_rates
from logitmix.mixture.configuration import resolve_weights
from logitmix.runs.files import SWEEP_FILE
from logitmix.runs.folder import console


@dataclass
class SweepArguments:
    """The alphas to sweep, and the ways to mix."""

    alphas: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)],
        metadata={"help": "Weights of the anchor; 0 and 1, the members alone, are always included."},
    )
    mixes: list[str] = field(
        default_factory=lambda: list(MIXES),
        metadata={"help": "logit and prob mix distributions; merge mixes weights: (1 - alpha) policy + alpha anchor."},
    )


@dataclass
class PairArguments:
    """The anchor of the pair."""

    anchor: str | None = field(default=None, metadata={"help": "Mix the model with this anchor."})


class SweepOptions(NamedTuple):
    """The options of a sweep."""

    data: TestProblemArguments
    model: ModelArguments
    pair: PairArguments
    sweep: SweepArguments
    decoding: DecodingArguments


GROUPS = tuple(SweepOptions.__annotations__.values())


def main(argv: Sequence[str]) -> None:
    description = "Format and answer rates of a pair at each alpha, mixed in three ways."
    run(SweepOptions(*parse("logitmix sweep", description, GROUPS, argv)))


def run(options: SweepOptions) -> None:
    """Decode, grade and report the pair at each alpha. Raises `ValueError` for options that cannot be swept."""
    asked, model_args, pair, swept, args = options
    between = sorted(set(swept.alphas) - set(MEMBERS.values()))
    mixes = list(dict.fromkeys(swept.mixes))
    for mix in mixes:
        if mix not in MIXES:
            raise ValueError(f"there is no mix {mix!r}; --mixes takes some of {', '.join(MIXES)}")
        for alpha in between:
            resolve_weights(alpha, None, 2, "logit" if mix == "merge" else mix)
    data_args = asked.resolve(model_args.model_name_or_path, pair.anchor)
    task = data_args.load()
    problems = task.problems("test", asked.eval_limit)
    if len(problems) < 2:
        raise ValueError(
            f"eval_limit is {asked.eval_limit}, but alpha is chosen on half of the problems and reported on the "
            "other half; raise it above 1"
        )
    model = open_mixture(model_args, MixtureArguments(pair.anchor))
    tokenizer = open_tokenizer(model_args)
    policy, anchor = model.members
    merged = merge_weights(policy, anchor) if "merge" in mixes else None
    decode = decoder(model, tokenizer, task, problems, args.max_new_tokens)

    def batches(alphas: dict[str, float]) -> list[list[Request]]:
        return in_batches(requests_for(alphas, len(problems)), args.batch_size)

    members = batches(dict(MEMBERS))
    given = [vars(group) for group in (asked, data_args, model_args, pair, swept, args)]
    arguments = {"command": "sweep"} | {key: value for group in given for key, value in group.items()}
    responses = open_responses(args.output_dir, arguments)
    responses.add("members alone", members, decode)
    for mix in mixes:
        if mix == "merge":
            continue
        model.config.scheme = mix  # type: ignore[assignment]
        requests = [Request(mix, alpha, i) for alpha in between for i in range(len(problems))]
        responses.add(f"mix {mix}", in_batches(requests, args.batch_size), decode)
    for alpha in between if merged is not None else []:
        set_merge(merged, policy, anchor, alpha)
        of_merged = _as_one_model(decoder(merged, tokenizer, task, problems, args.max_new_tokens))
        responses.add(f"merge at {alpha:g}", batches({"merge": alpha}), of_merged)

    table, choices = sweep_rates(responses.rows), choose_alpha(responses.rows)
    title = f"{task.name}, {len(problems)} test problems, greedy"
    print_sweep_intervals(title, table)
    print_choices(choices)
    if responses.path is not None:
        folder = responses.path.parent
        lines = {"rates": table, "choices": [asdict(choice) for choice in choices]}
        (folder / SWEEP_FILE).write_text(json.dumps(lines, indent=2) + "\n")
        plot_sweep(table, title, folder / "sweep.png", folder / "sweep.svg", members=("policy", "anchor"))
        console.print(f"{SWEEP_FILE}, sweep.png, sweep.svg and every response are in {folder}.", soft_wrap=True)


def _as_one_model(decode: Decode) -> Decode:
    """Decode requests at an alpha with a merged model, which takes no alpha; the responses keep it."""

    def decode_at(batches: Sequence[Sequence[Request]]) -> Iterator[list[Response]]:
        plain = [[replace(request, alpha=None) for request in batch] for batch in batches]
        for batch, responses in zip(batches, decode(plain), strict=True):
            yield [replace(response, alpha=request.alpha) for request, response in zip(batch, responses, strict=True)]

    return decode_at
