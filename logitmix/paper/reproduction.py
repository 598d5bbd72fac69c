"""Running the stages of a reproduction, each once, and collecting what they measured into its report."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from logitmix.evaluation.distillation import STUDENT
from logitmix.evaluation.metrics import group_by, rates
from logitmix.evaluation.outcomes import pack_outcomes
from logitmix.evaluation.responses import read_responses
from logitmix.evaluation.sweep import by_mix
from logitmix.mixture.merging import MERGED
from logitmix.paper.recipes import ARMS, DISTILLED
from logitmix.paper.report import write_report
from logitmix.paper.scales import load_scale
from logitmix.paper.stages import DISTILL_REPORT, SWEEP, Stage
from logitmix.runs.console import console
from logitmix.runs.files import EVALUATIONS_FILE, METRICS_FILE, RESPONSES_FILE, RUN_FILE, append_jsonl, read_jsonl
from logitmix.runs.folder import record_start, validate_same_arguments

TIMES_FILE = "times.jsonl"
LOG_FILE = "log.txt"
REPORT = "report"
LOGGED = ("reward", "format_rate", "alpha")  # the metrics of training that the report keeps


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


def report_stages(folder: Path, scale_name: str, stages: Sequence[Stage]) -> None:
    """Write the report of complete stages. It names no paths of this machine, so that it can be committed."""
    scale = load_scale(scale_name)
    *_, start = starts = read_jsonl(folder / RUN_FILE)
    seeds = len({stage.seed for stage in stages})
    command = f"logitmix reproduce --scale {scale_name} --seeds {seeds}"
    if start["arguments"]["eval_limit"] is not None:
        command += f" --eval_limit {start['arguments']['eval_limit']}"
    if start["arguments"].get("extra_arms") is not None:
        command += " --extra_arms " + " ".join(start["arguments"]["extra_arms"])
    seconds = sum(row["seconds"] for row in read_jsonl(folder / TIMES_FILE) if row["seed"] < seeds)
    about = {
        "what": "run",
        "scale": scale_name,
        "about": scale.about,
        "cell": scale.cell,
        "command": command,
        "seeds": seeds,
        "seconds": round(seconds),
        "started": starts[0]["started"],
    }
    # of the last training, which may have run on another machine and version than this report is written on
    *_, training = read_jsonl([stage for stage in stages if stage.verb == "train"][-1].folder / RUN_FILE)
    about |= {key: training[key] for key in ("versions", "python", "platform", "devices", "processor", "git")}
    rows = [about, *(row for stage in stages for row in read_results(stage))]
    arms = {arm: [stage.folder for stage in stages if stage.kind == arm] for arm in ARMS}
    write_report(folder / REPORT, rows, arms)


def read_results(stage: Stage) -> list[dict[str, Any]]:
    """What a complete stage measured, as rows of `results.jsonl`."""
    if stage.kind == SWEEP:
        return _sweep_results(stage)
    if stage.kind == DISTILLED:
        return _distilled_results(stage)
    return _training_results(stage) if stage.verb == "train" else []


def _sweep_results(stage: Stage) -> list[dict[str, Any]]:
    responses = read_responses(stage.folder / RESPONSES_FILE)
    return [
        {"what": "sweep", "seed": stage.seed, "scheme": scheme, "alpha": alpha}
        | asdict(rates(group))
        | pack_outcomes(group)
        for scheme, by_alpha in by_mix(responses).items()
        for alpha, group in sorted(by_alpha.items())
    ]


def _distilled_results(stage: Stage) -> list[dict[str, Any]]:
    """Evaluations of the student, and of the members' merged weights where they can be merged."""
    groups = group_by(read_responses(stage.folder / DISTILL_REPORT / RESPONSES_FILE), "name")
    found = {name: groups[key] for key, name in ((STUDENT, "model"), (MERGED, "merged")) if key in groups}
    return [
        {"what": "evaluation", "seed": stage.seed, "arm": DISTILLED, "step": stage.settings["max_steps"], "name": name}
        | asdict(rates(group))
        | pack_outcomes(group)
        for name, group in found.items()
    ]


def _training_results(stage: Stage) -> list[dict[str, Any]]:
    arm = {"seed": stage.seed, "arm": stage.kind}
    evaluations = read_jsonl(stage.folder / EVALUATIONS_FILE)
    first = min(row["step"] for row in evaluations)
    rows = [
        {"what": "evaluation"} | arm | row
        for row in evaluations
        if row["name"] != "anchor" or row["step"] == first  # the anchor is frozen
    ]
    for row in read_jsonl(stage.folder / METRICS_FILE):
        if "reward" in row:
            logged = {key: row[key] for key in LOGGED if key in row}
            rows.append({"what": "training"} | arm | {"step": row["step"]} | logged)
    return rows
