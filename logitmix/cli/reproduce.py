"""`logitmix reproduce`: every arm, table and figure of the paper at one scale, and its claims against what came out.

Everything is made by the other commands, stage by stage, each in a folder of its own: what is whole is not made again.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import set_seed

from logitmix.cli import sft, sweep, train
from logitmix.cli.options.parser import parse
from logitmix.cli.quickstart import CORPUS_SIZE
from logitmix.cli.quickstart import sft as train_on
from logitmix.evaluation.metrics import rates
from logitmix.evaluation.sweep import by_mix
from logitmix.paper.claims import check_size
from logitmix.paper.outcomes import packed_outcomes
from logitmix.paper.presets import BASE, SWEEP, Preset, Stage, load_preset, stages
from logitmix.paper.recipes import ARMS
from logitmix.paper.report import write_reproduction
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.runs.files import EVALUATIONS_FILE, METRICS_FILE, RESPONSES_FILE, RUN_FILE, read_jsonl
from logitmix.runs.folder import append_jsonl, console, record_start
from logitmix.tasks.arithmetic import Arithmetic

TIMES_FILE = "times.jsonl"
LOG_FILE = "log.txt"
REPORT = "report"
COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {"sft": sft.main, "train": train.main, "sweep": sweep.main}
LOGGED = ("reward", "format_rate", "alpha")  # of the training log


@dataclass
class ReproduceArguments:
    """What is reproduced, and where."""

    scale: str = field(
        default="tiny",
        metadata={"help": "tiny: arithmetic on a CPU; smoke: a minute; math-3b and so on: the paper's cells on GPUs."},
    )
    seeds: int = field(default=3, metadata={"help": "Seeds 0 to this; more can be added to what is there."})
    output_dir: str | None = field(default=None, metadata={"help": "Default runs/reproduce-<scale>."})
    eval_limit: int | None = field(default=None, metadata={"help": "Test problems; default the scale's, mostly 500."})
    dry_run: bool = field(default=False, metadata={"help": "Print the commands that it takes, and run nothing."})


def main(argv: Sequence[str]) -> None:
    (args,) = parse(
        "logitmix reproduce",
        "Every arm, table and figure of the paper at one scale, and its claims.",
        (ReproduceArguments,),
        argv,
    )
    scale = load_preset(args.scale)
    if args.seeds < 1:
        raise ValueError(f"seeds is {args.seeds}, but must be at least 1; with 3 the differences between them show")
    folder = Path(args.output_dir or f"runs/reproduce-{args.scale}")
    planned = stages(scale, args.seeds, folder, args.eval_limit)
    check_size(planned[-1].flags["eval_limit"])
    if args.dry_run:
        print_plan(planned)
        return
    open_folder(folder, {"command": "reproduce", "scale": args.scale, "eval_limit": args.eval_limit})
    try:
        for seed in range(args.seeds):
            made = [stage for stage in planned if stage.seed <= seed]
            run_stages(made, planned, folder)
            write(folder, args.scale, scale, made)
    except KeyboardInterrupt:
        console.print("The same command goes on from here: what is whole is not made again.")
        raise
    console.print(f"The claims, tables and figures are in {folder / REPORT / 'index.html'}.", soft_wrap=True)


def open_folder(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Begin a reproduction in the folder, or go on with it; the number of seeds may differ.

    Raises `ValueError` for a folder that holds something else, or a reproduction with other arguments.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --output_dir must be a folder")
    if (folder / RUN_FILE).exists():
        before = read_jsonl(folder / RUN_FILE)[-1]["arguments"]
        changed = [key for key in before | arguments if before.get(key) != arguments.get(key)]
        if changed:
            differences = ", ".join(f"{key} {before.get(key)!r}, now {arguments.get(key)!r}" for key in changed)
            raise ValueError(
                f"{folder} was started with {differences}; go on with the same, or choose another --output_dir"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else ({min(folder.iterdir()).name}); choose another --output_dir")
    record_start(str(folder), arguments)


def print_plan(planned: Sequence[Stage]) -> None:
    """The command of every stage; one that was run by hand, on several GPUs for instance, counts as whole."""
    for stage in planned:
        command = f"logitmix {' '.join((stage.verb, *stage.argv))}"
        print(f"# made here: the base model of {stage.name}" if stage.verb == BASE else command)


def run_stages(wanted: Sequence[Stage], planned: Sequence[Stage], folder: Path) -> None:
    """Make what is not whole; `planned` is all, for the time left."""
    for stage in wanted:
        if stage.is_whole:
            continue
        times = read_jsonl(folder / TIMES_FILE) if (folder / TIMES_FILE).exists() else []
        todo = [other for other in planned if not other.is_whole]
        place = f"[{planned.index(stage) + 1}/{len(planned)}]"
        console.print(f"{place} {stage.name}{time_left(times, [p.kind for p in todo])}", markup=False, highlight=False)
        started = time.monotonic()
        try:
            with (folder / LOG_FILE).open("a") as log, redirect_stdout(log):
                run_stage(stage)
        finally:  # what was spent before an interruption counts too
            seconds = round(time.monotonic() - started, 1)
            append_jsonl(folder / TIMES_FILE, [{"seed": stage.seed, "kind": stage.kind, "seconds": seconds}])


def run_stage(stage: Stage) -> None:
    """Make a stage, from its last checkpoint where it was interrupted and has one."""
    if stage.verb == BASE:
        make_base(stage)
    elif stage.verb != SWEEP and (stage.folder / RUN_FILE).exists():
        COMMANDS[stage.verb]([*stage.argv, "--resume_from_checkpoint", "true"])
    else:  # a sweep goes on by itself
        COMMANDS[stage.verb](stage.argv)


def make_base(stage: Stage) -> None:
    """The quickstart's base model. Seeds differ in its first weights and in the order of its corpus."""
    shutil.rmtree(stage.folder, ignore_errors=True)  # what an interruption left
    task = Arithmetic()
    tokenizer = character_tokenizer(task.alphabet)
    set_seed(stage.seed)
    model = tiny_model(len(tokenizer))
    corpus = task.base_corpus(CORPUS_SIZE)
    train_on(model, corpus, stage.folder, tokenizer, "base model", stage.flags["max_steps"], 5e-3, stage.seed)


def time_left(times: Sequence[Mapping[str, Any]], todo: Sequence[str]) -> str:
    """What the stages to do will take if each takes what its kind took before, or what all took; empty at first."""
    if not times:
        return ""
    spent: dict[str, dict[int, float]] = {}
    for row in times:
        by_seed = spent.setdefault(row["kind"], {})
        by_seed[row["seed"]] = by_seed.get(row["seed"], 0) + row["seconds"]
    by_kind = {kind: mean(by_seed.values()) for kind, by_seed in spent.items()}
    otherwise = mean(by_kind.values())
    minutes = sum(by_kind.get(kind, otherwise) for kind in todo) / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def write(folder: Path, name: str, scale: Preset, made: Sequence[Stage]) -> None:
    """The report of the stages, which are whole: a folder without a machine's paths, to be kept or committed."""
    *_, start = starts = read_jsonl(folder / RUN_FILE)
    seeds = len({stage.seed for stage in made})
    command = f"logitmix reproduce --scale {name} --seeds {seeds}"
    if start["arguments"]["eval_limit"] is not None:
        command += f" --eval_limit {start['arguments']['eval_limit']}"
    seconds = sum(row["seconds"] for row in read_jsonl(folder / TIMES_FILE) if row["seed"] < seeds)
    about = {
        "what": "run",
        "scale": name,
        "about": scale.about,
        "cell": scale.cell,
        "command": command,
        "seeds": seeds,
        "seconds": round(seconds),
        "started": starts[0]["started"],
    }
    # of what made the numbers, which may be another machine and version than what draws them
    *_, maker = read_jsonl([stage for stage in made if stage.verb == "train"][-1].folder / RUN_FILE)
    about |= {key: maker[key] for key in ("versions", "python", "platform", "devices", "processor", "git")}
    rows = [about, *(row for stage in made for row in results(stage))]
    arms = {arm: [stage.folder for stage in made if stage.kind == arm] for arm in ARMS}
    write_reproduction(folder / REPORT, rows, arms)


def results(stage: Stage) -> list[dict[str, Any]]:
    """What a whole stage measured, as rows of `results.jsonl`."""
    if stage.kind == SWEEP:
        responses = read_jsonl(stage.folder / RESPONSES_FILE)
        return [
            {"what": "sweep", "seed": stage.seed, "scheme": scheme, "alpha": alpha}
            | asdict(rates(rows))
            | packed_outcomes(rows)
            for scheme, by_alpha in by_mix(responses).items()
            for alpha, rows in sorted(by_alpha.items())
        ]
    if stage.verb != "train":
        return []
    which = {"seed": stage.seed, "arm": stage.kind}
    evaluations = read_jsonl(stage.folder / EVALUATIONS_FILE)
    first = min(row["step"] for row in evaluations)
    rows = [
        {"what": "evaluation"} | which | row
        for row in evaluations
        if row["name"] != "anchor" or row["step"] == first  # it is frozen
    ]
    for row in read_jsonl(stage.folder / METRICS_FILE):
        logged = {key: row[key] for key in LOGGED if key in row}
        rows += [{"what": "training"} | which | {"step": row["step"]} | logged] if "reward" in row else []
    return rows
