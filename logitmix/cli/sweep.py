"""`logitmix sweep`: a pair at every alpha, mixed in logits, in probabilities and in weights; the paper's table 4.

With `--preset` or `--weights`, several members instead, at the weights of a method or at those of a grid.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments
from logitmix.cli.options.model import (
    AnchorArguments,
    MixtureArguments,
    ModelArguments,
    find_model,
    load_mixture,
    load_several,
)
from logitmix.cli.options.parser import flatten, parse
from logitmix.evaluation.sweep import MEMBERS, MIXES, choose_alpha, dropped_notes, plan_rounds, sweep_rates
from logitmix.runs.console import console
from logitmix.runs.files import SWEEP_FILE
from logitmix.tasks import Problem, Task
from logitmix.tasks.names import unknown_name

if TYPE_CHECKING:
    from logitmix.evaluation.responses import Responses
    from logitmix.mixture.presets import Preset


@dataclass
class SweepArguments:
    """Sweep"""

    alphas: list[float] = field(
        default_factory=lambda: [i / 10 for i in range(11)],
        metadata={"help": "Weights of the anchor; 0 and 1, the members alone, are always included."},
    )
    mixes: list[str] = field(
        default_factory=lambda: list(MIXES),
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
class FamilyArguments:
    """Several members"""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Sweep the --alphas of a method: dexperts (base, expert, antiexpert), proxy_tuning (large, "
            "small_tuned, small_base) or contrastive_decoding (expert, amateur)."
        },
    )
    weights: Literal["simplex"] | None = field(
        default=None, metadata={"help": "simplex: ensembles of the members, at a grid of weights that sum to 1."}
    )
    members: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders or hub ids of the members after the first, which is --model_name_or_path; none if that "
            "is a saved mixture."
        },
    )
    plausibility: float | None = field(
        default=None,
        metadata={
            "help": "Rule out tokens below this share of the probability of the first member's most probable token; "
            "default: a saved mixture's own, and 0.1 for contrastive_decoding."
        },
    )
    simplex_parts: int = field(
        default=4, metadata={"help": "The weights of the grid are multiples of 1 / simplex_parts."}
    )
    simplex_scheme: Literal["logit", "prob"] = field(
        default="logit", metadata={"help": "How the ensembles of the grid are mixed."}
    )


@dataclass
class SweepOptions:
    problems: TestProblemArguments
    model: ModelArguments
    mixture: AnchorArguments
    sweep: SweepArguments
    family: FamilyArguments
    decoding: DecodingArguments


def main(argv: Sequence[str]) -> None:
    description = (
        "Evaluate a pair at every alpha, mixed in three ways, or several members at the weights of a method or of a "
        "grid, on the same test problems."
    )
    options = parse("sweep", description, SweepOptions, argv)
    if options.family == FamilyArguments():
        run(options)
    else:
        run_family(options)


def run(options: SweepOptions) -> None:
    """Decode and grade, print the tables and write responses, rates and a figure; an interrupted sweep continues."""
    from logitmix.evaluation.decode import make_decoder
    from logitmix.evaluation.responses import open_responses
    from logitmix.evaluation.sweep_decoding import Decoders, decode_sweep
    from logitmix.mixture.configuration import resolve_weights
    from logitmix.mixture.loading import require_tokenizer
    from logitmix.mixture.merging import merge_weights

    model_args, args = options.model, options.decoding
    between = sorted(set(options.sweep.alphas) - set(MEMBERS.values()))
    if not between:
        raise ValueError(
            "--alphas has only 0 and 1, the members alone, which logitmix eval compares; add a weight such as 0.5"
        )
    mixes = list(dict.fromkeys(options.sweep.mixes))
    for mix in mixes:
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES, f"--mixes takes some of {', '.join(MIXES)}")
        for alpha in between:
            resolve_weights(alpha, None, 2, "logit" if mix == "merge" else mix)
    data_args, task = options.problems.resolve_task(model_args.model_name_or_path, options.mixture.anchor)
    problems = _test_problems(task, options.problems.eval_limit, "alpha is")
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
    report(responses, mixes, f"{task.name}, {len(problems)} test problems, greedy")


def report(responses: "Responses", mixes: Sequence[str], title: str) -> None:
    """Print the tables of a sweep; beside its responses, if they are in a folder, write the rates and a figure."""
    from logitmix.evaluation.explanations import explain
    from logitmix.evaluation.report.figures import plot_sweep
    from logitmix.evaluation.report.tables import BETA_NOTE, print_choices, print_notes, print_sweep_intervals

    table, choices = sweep_rates(responses.rows), choose_alpha(responses.rows)
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


def run_family(options: SweepOptions) -> None:
    """Decode and grade the members alone and the mixture at each of the weights; print the rates and the best weights.

    An interrupted sweep continues. Raises `ValueError` for flags of the other sweep, and for members that do not fit.
    """
    from logitmix.evaluation.decode import make_decoder
    from logitmix.evaluation.report.tables import print_points, print_weights_choice
    from logitmix.evaluation.requests import make_batches, make_requests, one_hot_weights
    from logitmix.evaluation.responses import open_responses
    from logitmix.evaluation.weights_sweep import choose_weights, preset_points, simplex_points
    from logitmix.mixture.loading import require_tokenizer
    from logitmix.mixture.mixing import Plausibility

    model_args, family, args = options.model, options.family, options.decoding
    source = model_args.model_name_or_path
    _validate_flags(options)
    preset = _find_preset(family)
    points = {} if preset is None else preset_points(preset, options.sweep.alphas)
    if family.plausibility is not None:
        Plausibility(family.plausibility)  # before anything loads
    members = [find_model(member) for member in family.members or ()]
    data_args, task = options.problems.resolve_task(source, *members)
    problems = _test_problems(task, options.problems.eval_limit, "weights are")
    model = load_several(model_args, members)
    config, names = model.config, model.config.members if preset is None else list(preset.roles)
    if preset is not None and len(names) != len(config.members):
        raise ValueError(f"{source} is a mixture of {len(config.members)} members; {_takes(preset)}")
    if preset is None:
        points = simplex_points(len(names), family.simplex_parts, family.simplex_scheme)
    config.scheme = "logit" if preset is not None else family.simplex_scheme
    if family.plausibility is not None:
        config.set_plausibility(family.plausibility)
    elif members and family.preset == "contrastive_decoding":
        config.set_plausibility(0.1)
    weights = one_hot_weights(names) | points
    tokenizer = require_tokenizer(source)
    decode = make_decoder(
        model, tokenizer, task, problems, args.max_new_tokens, decoding=args.decoding, weights=weights
    )
    arguments = {"command": "sweep"}
    arguments |= flatten(options.problems, data_args, model_args, options.mixture, options.sweep, family, args)
    responses = open_responses(args.output_dir, arguments, dict.fromkeys(weights, len(problems)))
    requests = make_requests(dict.fromkeys(weights), len(problems))
    responses.add("sweep of weights", make_batches(requests, args.batch_size), decode)

    print_points(f"{task.name}, {len(problems)} test problems, greedy", responses.rows)
    choice = choose_weights(responses.rows, points, names)
    print_weights_choice(choice)
    if responses.path is not None:
        path = responses.path.parent / SWEEP_FILE
        path.write_text(json.dumps({"weights": weights, "choice": asdict(choice)}, indent=2) + "\n")
        console.print(f"{SWEEP_FILE} and every response are in {path.parent}.", soft_wrap=True)


def _test_problems(task: Task, limit: int | None, chosen: str) -> list[Problem]:
    """The test problems. Raises `ValueError` for fewer than two, of which no half is left to report on."""
    problems = task.problems("test", limit)
    if len(problems) < 2:
        raise ValueError(
            f"eval_limit is {limit}, but {chosen} chosen on half of the problems and reported on the other half; "
            "raise it above 1"
        )
    return problems


def _validate_flags(options: SweepOptions) -> None:
    """Raise `ValueError` for flags that the sweep of several members does not read."""
    sweep, family = options.sweep, options.family
    if (family.preset is None) == (family.weights is None):
        raise ValueError("give either --preset, to sweep a method's alpha, or --weights simplex, to sweep ensembles")
    unread = {
        "anchor": options.mixture.anchor is not None,
        "mixes": sweep.mixes != list(MIXES),
        "halve_from": sweep.halve_from is not None,
        "alphas": family.preset is None and sweep.alphas != SweepArguments().alphas,
        "simplex_parts": family.weights is None and family.simplex_parts != FamilyArguments.simplex_parts,
        "simplex_scheme": family.weights is None and family.simplex_scheme != FamilyArguments.simplex_scheme,
    }
    flags = [f"--{name}" for name, is_given in unread.items() if is_given]
    if flags:
        kind = "--weights simplex" if family.preset is None else f"--preset {family.preset}"
        way_out = "; give the members after the first as --members" if "--anchor" in flags else ""
        raise ValueError(f"{kind} does not read {', '.join(flags)}{way_out or '; leave it out'}")


def _find_preset(family: FamilyArguments) -> "Preset | None":
    from logitmix.mixture.presets import PRESETS

    if family.preset is None:
        return None
    if family.preset not in PRESETS:
        raise unknown_name("preset", family.preset, PRESETS, f"--preset takes one of {', '.join(PRESETS)}")
    preset = PRESETS[family.preset]
    if family.members is not None and len(family.members) != len(preset.roles) - 1:
        raise ValueError(f"--members names {len(family.members)} members; {_takes(preset)}")
    return preset


def _takes(preset: "Preset") -> str:
    first, *others = preset.roles
    return f"{preset.name} takes the {first} as --model_name_or_path and as --members {' and '.join(others)}"
