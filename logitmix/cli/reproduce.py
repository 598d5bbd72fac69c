"""`logitmix reproduce`: every arm, table and figure of the paper at one scale, and the verdicts on its claims.

The other commands make it, stage by stage, each stage in its own folder. A complete stage is not made again.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitmix.cli.options.evaluation import DECODING_HELP, Decoding
from logitmix.cli.options.parser import build, parse
from logitmix.paper.scales import load_scale
from logitmix.paper.stages import BASE, Stage, plan_stages
from logitmix.runs.files import RUN_FILE
from logitmix.tasks.arithmetic import Arithmetic


@dataclass
class ReproduceArguments:
    """Reproduction"""

    scale: str = field(
        default="tiny",
        metadata={
            "help": "tiny: arithmetic on a CPU; smollm2: a real model on a CPU, after fetch-example; smoke: every "
            "part once, in a minute; math-3b and so on: a cell of the paper, on GPUs."
        },
    )
    seeds: int = field(
        default=3, metadata={"help": "Number of seeds, from 0; running again with more adds the missing ones."}
    )
    earlier_results: str | None = field(
        default=None,
        metadata={
            "help": "results.jsonl of an earlier report at the same scale, as of another machine: its seeds join "
            "the report and are not run again."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the reproduction; default: runs/reproduce-SCALE."}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Number of test problems; default: the scale's, 500 for most."}
    )
    extra_arms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Arms beyond the paper that end with one model: distilled, anneal, policy_target; default: the "
            "scale's, which is all three for tiny and smoke and none for others."
        },
    )
    decoding: Decoding | None = field(
        default=None, metadata={"help": f"In all stages that decode a mixture; default auto. {DECODING_HELP}"}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the commands of all stages, and run nothing."})


def main(argv: Sequence[str]) -> None:
    description = (
        "Run every arm of the paper at one scale, and report its tables, figures and claims. The same command again "
        "continues an interrupted reproduction."
    )
    run(parse("reproduce", description, ReproduceArguments, argv))


def run(args: ReproduceArguments) -> None:
    from logitmix.paper.claims import validate_num_problems
    from logitmix.paper.reproduction import REPORT, estimate_time, report_stages, run_stages, start_reproduction
    from logitmix.paper.results import read_earlier_results
    from logitmix.runs.console import console

    scale = load_scale(args.scale)
    if args.seeds < 1:
        raise ValueError(f"seeds is {args.seeds}, but must be at least 1; 3 show how much seeds differ")
    folder = Path(args.output_dir or f"runs/reproduce-{args.scale}")
    planned = plan_stages(scale, range(args.seeds), folder, args.eval_limit, args.decoding, args.extra_arms)
    num_problems = planned[-1].settings["eval_limit"]
    validate_num_problems(num_problems)
    earlier: list[dict[str, Any]] = []
    if args.earlier_results is not None:
        arms = {stage.kind for stage in planned if stage.verb in ("train", "distill")}
        earlier = read_earlier_results(Path(args.earlier_results), args.scale, arms, num_problems)
        planned = [stage for stage in planned if stage.seed not in {row["seed"] for row in earlier[1:]}]
        if not planned:
            raise ValueError(f"{args.earlier_results} has every seed below {args.seeds}; give more --seeds")
    if args.dry_run:
        console.print(f"{estimate_time(folder, planned, scale.minutes)}.", soft_wrap=True, highlight=False)
        print_commands(planned)
        return
    arguments: dict[str, Any] = {"command": "reproduce", "scale": args.scale, "eval_limit": args.eval_limit}
    arguments |= {} if args.decoding is None else {"decoding": args.decoding}
    arguments |= {} if args.extra_arms is None else {"extra_arms": args.extra_arms}
    start_reproduction(folder, arguments)
    try:
        for seed in sorted({stage.seed for stage in planned}):
            stages = [stage for stage in planned if stage.seed <= seed]
            run_stages(stages, planned, folder, run_stage)
            report_stages(folder, args.scale, stages, earlier)
    except KeyboardInterrupt:
        console.print("Run the same command to continue; complete stages are not made again.")
        raise
    console.print(f"The claims, tables and figures are in {folder / REPORT / 'index.html'}.", soft_wrap=True)


def print_commands(planned: Sequence[Stage]) -> None:
    """Print the command of every stage. A stage may also be run by hand, for instance on several GPUs."""
    for stage in planned:
        print(f"# made here: the base model of {stage.name}" if stage.verb == BASE else " ".join(stage.command))


def run_stage(stage: Stage) -> None:
    """Make a stage, from its last checkpoint if it was interrupted and has one."""
    from logitmix.cli import distill, sft, sweep, train

    settings = dict(stage.settings)
    if stage.verb in ("sft", "train", "distill") and (stage.folder / RUN_FILE).exists():
        settings["resume_from_checkpoint"] = "true"
    if stage.verb == BASE:
        make_base(stage)
    elif stage.verb == "sft":
        sft.run(build(sft.SFTOptions, stage.recipe, settings), stage.command)
    elif stage.verb == "train":
        train.run(build(train.TrainOptions, stage.recipe, settings), stage.command)
    elif stage.verb == "distill":
        distill.run(build(distill.DistillOptions, stage.recipe, settings), stage.command)
    else:
        sweep.run(build(sweep.SweepOptions, stage.recipe, settings))


def make_base(stage: Stage) -> None:
    """Train the quickstart's base model. Seeds differ in its initial weights and in the order of its corpus."""
    from logitmix.paper.tiny_training import train_base

    shutil.rmtree(stage.folder, ignore_errors=True)  # of an interrupted stage, which has no checkpoints
    train_base(Arithmetic(), stage.folder, "base model", stage.settings["max_steps"], stage.seed)
