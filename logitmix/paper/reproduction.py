"""A reproduction: its stages, run one after the other, and the report of what they measured."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from logitmix.evaluation.metrics import rates
from logitmix.evaluation.sweep import by_mix
from logitmix.paper.outcomes import packed_outcomes
from logitmix.paper.presets import SWEEP, Preset, Stage
from logitmix.paper.recipes import ARMS
from logitmix.paper.report import write_reproduction
from logitmix.runs.files import EVALUATIONS_FILE, METRICS_FILE, RESPONSES_FILE, RUN_FILE, read_jsonl
from logitmix.runs.folder import append_jsonl, console, record_start, validate_same_arguments

TIMES_FILE = "times.jsonl"
LOG_FILE = "log.txt"
REPORT = "report"
LOGGED = ("reward", "format_rate", "alpha")  # the training metrics that the report draws

Runner = Callable[[Stage], None]


def open_folder(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Start a reproduction in the folder, or continue it; the number of seeds may differ.

    Raises `ValueError` for a folder that holds something else, or a reproduction with other arguments.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --output_dir must be a folder")
    if (folder / RUN_FILE).exists():
        before = read_jsonl(folder / RUN_FILE)[-1]["arguments"]
        way_out = "continue it with the same, or choose another --output_dir"
        validate_same_arguments(folder, before, arguments, (), way_out)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else ({min(folder.iterdir()).name}); choose another --output_dir")
    record_start(str(folder), arguments)


def run_stages(wanted: Sequence[Stage], planned: Sequence[Stage], folder: Path, runners: Mapping[str, Runner]) -> None:
    """Run the wanted stages that are not complete, by the runner of each stage's verb.

    `planned` are all stages, for the estimate of the time left.
    """
    for stage in wanted:
        if stage.is_complete:
            continue
        times = read_jsonl(folder / TIMES_FILE) if (folder / TIMES_FILE).exists() else []
        left = [other.kind for other in planned if not other.is_complete]
        place = f"[{planned.index(stage) + 1}/{len(planned)}]"
        console.print(f"{place} {stage.name}{time_left(times, left)}", markup=False, highlight=False)
        started = time.monotonic()
        try:
            with (folder / LOG_FILE).open("a") as log, redirect_stdout(log):
                runners[stage.verb](stage)
        finally:  # the time before an interruption counts too
            seconds = round(time.monotonic() - started, 1)
            append_jsonl(folder / TIMES_FILE, [{"seed": stage.seed, "kind": stage.kind, "seconds": seconds}])


def time_left(times: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """The time that stages of these kinds will take, from the mean of their kind so far, or of all; empty at first."""
    if not times:
        return ""
    spent: dict[str, dict[int, float]] = {}
    for row in times:
        by_seed = spent.setdefault(row["kind"], {})
        by_seed[row["seed"]] = by_seed.get(row["seed"], 0) + row["seconds"]
    by_kind = {kind: mean(by_seed.values()) for kind, by_seed in spent.items()}
    overall = mean(by_kind.values())
    minutes = sum(by_kind.get(kind, overall) for kind in kinds) / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def write_report(folder: Path, name: str, preset: Preset, completed: Sequence[Stage]) -> None:
    """Write the report of complete stages: a folder without this machine's paths, fit to be kept or committed."""
    *_, start = starts = read_jsonl(folder / RUN_FILE)
    seeds = len({stage.seed for stage in completed})
    command = f"logitmix reproduce --scale {name} --seeds {seeds}"
    if start["arguments"]["eval_limit"] is not None:
        command += f" --eval_limit {start['arguments']['eval_limit']}"
    seconds = sum(row["seconds"] for row in read_jsonl(folder / TIMES_FILE) if row["seed"] < seeds)
    about = {
        "what": "run",
        "scale": name,
        "about": preset.about,
        "cell": preset.cell,
        "command": command,
        "seeds": seeds,
        "seconds": round(seconds),
        "started": starts[0]["started"],
    }
    # the machine and versions of the training, which may differ from those that draw the report
    *_, trained = read_jsonl([stage for stage in completed if stage.verb == "train"][-1].folder / RUN_FILE)
    about |= {key: trained[key] for key in ("versions", "python", "platform", "devices", "processor", "git")}
    rows = [about, *(row for stage in completed for row in results(stage))]
    arms = {arm: [stage.folder for stage in completed if stage.kind == arm] for arm in ARMS}
    write_reproduction(folder / REPORT, rows, arms)


def results(stage: Stage) -> list[dict[str, Any]]:
    """What a complete stage measured, as rows of `results.jsonl`."""
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
        if row["name"] != "anchor" or row["step"] == first  # the anchor is frozen
    ]
    for row in read_jsonl(stage.folder / METRICS_FILE):
        logged = {key: row[key] for key in LOGGED if key in row}
        rows += [{"what": "training"} | which | {"step": row["step"]} | logged] if "reward" in row else []
    return rows
