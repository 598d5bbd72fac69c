"""Running the stages of a reproduction, each once, and writing their report."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Any

from logitmix.evaluation.report.curves import count_updates
from logitmix.paper.report import write_report
from logitmix.paper.results import read_results
from logitmix.paper.scales import load_scale
from logitmix.paper.stages import Stage
from logitmix.runs.console import console
from logitmix.runs.files import RUN_FILE, append_jsonl, read_jsonl
from logitmix.runs.folder import record_start, validate_same_arguments

TIMES_FILE = "times.jsonl"
LOG_FILE = "log.txt"
REPORT = "report"


def start_reproduction(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Start a reproduction in the folder or continue the one in it, and record the start in `run.jsonl`.

    Raises `ValueError` for a folder that holds anything else, or a reproduction with other arguments.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --output_dir must be a folder")
    if (folder / RUN_FILE).exists():
        validate_same_arguments(folder, arguments)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else ({min(folder.iterdir()).name}); choose another --output_dir")
    record_start(str(folder), arguments)


def run_stages(
    wanted: Sequence[Stage], planned: Sequence[Stage], folder: Path, run_stage: Callable[[Stage], None]
) -> None:
    """Run the wanted stages that are not complete; `planned` are all, to estimate the time left.

    `run_stage` makes one stage, continuing an interrupted one. What it prints on standard output goes to `log.txt`.
    """
    for stage in wanted:
        if stage.is_complete:
            continue
        times = read_jsonl(folder / TIMES_FILE) if (folder / TIMES_FILE).exists() else []
        remaining = [other.kind for other in planned if not other.is_complete]
        place = f"[{planned.index(stage) + 1}/{len(planned)}]"
        console.print(f"{place} {stage.name}{format_time_left(times, remaining)}", markup=False, highlight=False)
        started = time.monotonic()
        try:
            with (folder / LOG_FILE).open("a") as log, redirect_stdout(log):
                run_stage(stage)
        finally:  # the time before an interruption counts too
            seconds = round(time.monotonic() - started, 1)
            append_jsonl(folder / TIMES_FILE, [{"seed": stage.seed, "kind": stage.kind, "seconds": seconds}])


def estimate_time(folder: Path, planned: Sequence[Stage], minutes: float | None) -> str:
    """How long the planned stages take that are not complete, `"24 stages, about 210 min"`.

    By the stages that have been timed in the folder, or by the `minutes` of a seed as measured elsewhere.
    """
    remaining = [stage for stage in planned if not stage.is_complete]
    stages = f"{len(remaining)} of {len(planned)} stages to run"
    if (folder / TIMES_FILE).exists():
        times = read_jsonl(folder / TIMES_FILE)
        return stages + format_time_left(times, [stage.kind for stage in remaining])
    if minutes is None:
        return f"{stages}; nobody has measured yet how long they take"
    total = minutes * len({stage.seed for stage in planned}) * len(remaining) / len(planned)
    return f"{stages}, about {total:.0f} min on two cores of AMD EPYC"


def format_time_left(times: Sequence[Mapping[str, Any]], remaining: Sequence[str]) -> str:
    """`", about 4 min left"` for stages of the remaining kinds, or `""` if no stage has been timed yet.

    A stage is assumed to take as long as the mean of its kind over seeds, or of all kinds if its own has not run.
    """
    if not times:
        return ""
    seconds: dict[str, dict[int, float]] = {}
    for row in times:
        by_seed = seconds.setdefault(row["kind"], {})
        by_seed[row["seed"]] = by_seed.get(row["seed"], 0) + row["seconds"]
    by_kind = {kind: mean(by_seed.values()) for kind, by_seed in seconds.items()}
    default = mean(by_kind.values())
    minutes = sum(by_kind.get(kind, default) for kind in remaining) / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


def report_stages(
    folder: Path, scale_name: str, stages: Sequence[Stage], earlier: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the report of complete stages and of the seeds in the rows of an earlier report.

    It names no paths of this machine, so that it can be committed.
    """
    scale = load_scale(scale_name)
    *_, start = starts = read_jsonl(folder / RUN_FILE)
    seeds = {stage.seed for stage in stages}
    earlier_seeds = sorted({row["seed"] for row in earlier[1:]})
    num_seeds = len(seeds) + len(earlier_seeds)
    command = f"logitmix reproduce --scale {scale_name} --seeds {num_seeds}"
    if start["arguments"]["eval_limit"] is not None:
        command += f" --eval_limit {start['arguments']['eval_limit']}"
    if start["arguments"].get("extra_arms") is not None:
        command += " --extra_arms " + " ".join(start["arguments"]["extra_arms"])
    seconds = sum(row["seconds"] for row in read_jsonl(folder / TIMES_FILE) if row["seed"] in seeds)
    about = {
        "what": "run",
        "scale": scale_name,
        "about": scale.about,
        "cell": scale.cell,
        "command": command,
        "seeds": num_seeds,
        "seconds": round(seconds),
        "started": starts[0]["started"],
    }
    # of the last training, which may have run on another machine and version than this report is written on
    *_, training = read_jsonl([stage for stage in stages if stage.verb == "train"][-1].folder / RUN_FILE)
    about |= {key: training[key] for key in ("versions", "python", "platform", "devices", "processor", "git")}
    about["updates_per_outer_step"] = count_updates(training["arguments"])
    if earlier:
        about["earlier"] = {**earlier[0], "seeds_taken": earlier_seeds}
    rows = [*earlier[1:], *(row for stage in stages for row in read_results(stage))]
    write_report(folder / REPORT, [about, *sorted(rows, key=lambda row: row["seed"])])
