"""`logitmix reproduce`: every arm, table and figure of the paper at one scale, and a verdict on each claim.

Each stage runs like the command of its name, in a folder of its own. A stage that is complete does not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitmix.cli import sft, sweep, train
from logitmix.cli.options.parser import build, parse
from logitmix.cli.quickstart import make_base
from logitmix.paper.claims import check_size
from logitmix.paper.presets import BASE, Stage, load_preset, stages
from logitmix.paper.reproduction import REPORT, open_folder, run_stages, write_report
from logitmix.runs.files import RUN_FILE
from logitmix.runs.folder import console
from logitmix.tasks.arithmetic import Arithmetic


@dataclass
class ReproduceArguments:
    """What to reproduce, and where."""

    scale: str = field(
        default="tiny",
        metadata={"help": "tiny: arithmetic on a CPU; smoke: a minute; math-3b and so on: the paper's cells on GPUs."},
    )
    seeds: int = field(default=3, metadata={"help": "Number of seeds, from 0; a later run can add more."})
    output_dir: str | None = field(default=None, metadata={"help": "Default runs/reproduce-<scale>."})
    eval_limit: int | None = field(
        default=None, metadata={"help": "Number of test problems; default the scale's, mostly 500."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the command of each stage, and run nothing."})


def main(argv: Sequence[str]) -> None:
    description = "Every arm, table and figure of the paper at one scale, and a verdict on each claim."
    (args,) = parse("logitmix reproduce", description, (ReproduceArguments,), argv)
    preset = load_preset(args.scale)
    if args.seeds < 1:
        raise ValueError(f"seeds is {args.seeds}, but must be at least 1; 3 show the differences between seeds")
    folder = Path(args.output_dir or f"runs/reproduce-{args.scale}")
    planned = stages(preset, args.seeds, folder, args.eval_limit)
    check_size(planned[-1].settings["eval_limit"])
    if args.dry_run:
        print_commands(planned)
        return
    open_folder(folder, {"command": "reproduce", "scale": args.scale, "eval_limit": args.eval_limit})
    try:
        for seed in range(args.seeds):
            wanted = [stage for stage in planned if stage.seed <= seed]
            run_stages(wanted, planned, folder, RUNNERS)
            write_report(folder, args.scale, preset, wanted)
    except KeyboardInterrupt:
        console.print("Repeat the command to continue; complete stages do not run again.")
        raise
    console.print(f"The claims, tables and figures are in {folder / REPORT / 'index.html'}.", soft_wrap=True)


def print_commands(planned: Sequence[Stage]) -> None:
    """Print the command of each stage; a stage run by hand, on several GPUs for instance, counts as complete."""
    for stage in planned:
        print(f"# made here: the base model of {stage.name}" if stage.verb == BASE else " ".join(stage.command))


def run_base(stage: Stage) -> None:
    make_base(Arithmetic(), stage.folder, stage.seed, stage.settings["max_steps"])


def run_sft(stage: Stage) -> None:
    sft.run(sft.SFTOptions(*build(sft.GROUPS, **_resumed(stage))), stage.command)


def run_train(stage: Stage) -> None:
    train.run(train.TrainOptions(*build(train.GROUPS, **_resumed(stage))), stage.command)


def run_sweep(stage: Stage) -> None:
    """A sweep continues where it was interrupted, without a flag."""
    sweep.run(sweep.SweepOptions(*build(sweep.GROUPS, None, stage.settings)))


RUNNERS = {BASE: run_base, "sft": run_sft, "train": run_train, "sweep": run_sweep}


def _resumed(stage: Stage) -> dict[str, Any]:
    """The recipe and the other settings of a training stage, resumed from its last checkpoint if it was started."""
    values = dict(stage.settings)
    recipe = values.pop("recipe")
    if (stage.folder / RUN_FILE).exists():
        values["resume_from_checkpoint"] = "true"
    return {"recipe": recipe, "values": values}
