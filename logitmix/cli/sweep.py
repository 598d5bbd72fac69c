"""`logitmix sweep`: a pair at every alpha, mixed in logits, in probabilities and in weights; the paper's table 4."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments
from logitmix.cli.options.model import AnchorArguments, MixtureArguments, ModelArguments, load_mixture
from logitmix.cli.options.parser import flatten, parse
from logitmix.runs.console import console
from logitmix.runs.files import SWEEP_FILE
from logitmix.tasks.names import unknown_name


@dataclass
class SweepArguments:
    """Sweep"""

    alphas: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)],
        metadata={"help": "Weights of the anchor; 0 and 1, the members alone, are always included."},
    )
    mixes: list[str] = field(
        default_factory=lambda: ["logit", "prob", "merge"],
        metadata={
            "help": "Ways to mix: logit and prob mix distributions, merge mixes weights, (1 - alpha) policy + alpha "
            "anchor."
        },
    )
    halve_from: int | None = field(
        default=None,
        metadata={
            "help": "Decode every alpha on this many problems first, then the better half of them on twice as many, "
            "and so on; default: every alpha on all problems."
        },
    )


@dataclass
class SweepOptions:
    problems: TestProblemArguments
    model: ModelArguments
    mixture: AnchorArguments
    sweep: SweepArguments
    decoding: DecodingArguments


def main(argv: Sequence[str]) -> None:
    description = "Evaluate a pair at every alpha, mixed in three ways, on the same test problems."
    run(parse("sweep", description, SweepOptions, argv))


def run(options: SweepOptions) -> None:
    """Decode and grade, print the tables and write responses, rates and a figure; an interrupted sweep continues."""
    from logitmix.evaluation.decode import make_decoder
    from logitmix.evaluation.explanations import explain
    from logitmix.evaluation.report.figures import plot_sweep
    from logitmix.evaluation.report.tables import BETA_NOTE, print_choices, print_notes, print_sweep_intervals
    from logitmix.evaluation.responses import open_responses
    from logitmix.evaluation.sweep import MEMBERS, MIXES, choose_alpha, dropped_notes, plan_rounds, sweep_rates
    from logitmix.evaluation.sweep_decoding import Decoders, decode_sweep
    from logitmix.mixture.configuration import resolve_weights
    from logitmix.mixture.loading import require_tokenizer
    from logitmix.mixture.merging import merge_weights

    model_args, args = options.model, options.decoding
    between = sorted(set(options.sweep.alphas) - set(MEMBERS.values()))
    mixes = list(dict.fromkeys(options.sweep.mixes))
    for mix in mixes:
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES, f"--mixes takes some of {', '.join(MIXES)}")
        for alpha in between:
            resolve_weights(alpha, None, 2, "logit" if mix == "merge" else mix)
    data_args, task = options.problems.resolve_task(model_args.model_name_or_path, options.mixture.anchor)
    problems = task.problems("test", options.problems.eval_limit)
    if len(problems) < 2:
        raise ValueError(
            f"eval_limit is {options.problems.eval_limit}, but alpha is chosen on half of the problems and reported "
            "on the other half; raise it above 1"
        )
    rounds = plan_rounds(len(between), len(problems), options.sweep.halve_from)
    pair = load_mixture(model_args, MixtureArguments(options.mixture.anchor))
    tokenizer = require_tokenizer(model_args.model_name_or_path)
    (policy, anchor), way_out = pair.members, "leave the merge out, with --mixes logit prob"
    merged = merge_weights(policy, anchor, way_out) if "merge" in mixes else None
    decoders = Decoders(
        pair,
        make_decoder(pair, tokenizer, task, problems, args.max_new_tokens, decoding=args.decoding),
        merged,
        None if merged is None else make_decoder(merged, tokenizer, task, problems, args.max_new_tokens),
    )
    arguments = {"command": "sweep"}
    arguments |= flatten(options.problems, data_args, model_args, options.mixture, options.sweep, args)
    decoded = sum(part.num_alphas * (part.stop - part.start) for part in rounds)
    expected = dict.fromkeys(MEMBERS, len(problems)) | dict.fromkeys(mixes, decoded)
    responses = open_responses(args.output_dir, arguments, expected)
    decode_sweep(responses, decoders, len(problems), mixes, between, args.batch_size, rounds)

    table, choices = sweep_rates(responses.rows), choose_alpha(responses.rows)
    title = f"{task.name}, {len(problems)} test problems, greedy"
    print_sweep_intervals(title, table)
    print_choices(choices)
    notes = [BETA_NOTE] if "logit" in mixes else []
    print_notes([*notes, *dropped_notes(responses.rows), *explain(responses.rows)])
    if responses.path is not None:
        folder = responses.path.parent
        lines = {"rates": table, "choices": [asdict(choice) for choice in choices]}
        (folder / SWEEP_FILE).write_text(json.dumps(lines, indent=2) + "\n")
        plot_sweep(table, title, folder / "sweep.png", folder / "sweep.svg", members=("policy", "anchor"))
        console.print(f"{SWEEP_FILE}, sweep.png, sweep.svg and every response are in {folder}.", soft_wrap=True)
