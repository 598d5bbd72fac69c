"""The rows of a reproduction's `results.jsonl`: measured by its complete stages, or read from an earlier report."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitmix.evaluation.distillation import STUDENT
from logitmix.evaluation.metrics import group_by, rates
from logitmix.evaluation.outcomes import pack_outcomes
from logitmix.evaluation.responses import read_responses
from logitmix.evaluation.sweep import by_mix
from logitmix.mixture.merging import MERGED
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.recipes import DISTILLED
from logitmix.paper.stages import DISTILL_REPORT, SWEEP, Stage
from logitmix.runs.files import EVALUATIONS_FILE, METRICS_FILE, RESPONSES_FILE, read_jsonl

LOGGED = ("reward", "format_rate", "alpha")  # the metrics of training that the report keeps


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


def read_earlier_results(path: Path, scale: str, arms: Collection[str], num_problems: int) -> list[dict[str, Any]]:
    """The rows of an earlier report's `results.jsonl`, whose seeds are not to be run again.

    Raises `ValueError` for a file of another kind, and for one whose scale, arms or number of test problems are not
    those of the reproduction that it is to be part of.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the results.jsonl in it")
    rows = read_jsonl(path)
    if not rows or rows[0].get("what") != "run":
        raise ValueError(f"{path} is not the results.jsonl of a reproduction's report")
    if (found := rows[0].get("scale")) != scale:
        raise ValueError(f"{path} is of the scale {found!r}, not {scale!r}; give --scale {found}")
    outcomes = Outcomes(rows)
    if outcomes.n != num_problems:
        raise ValueError(f"{path} has {outcomes.n} test problems, not {num_problems}; give --eval_limit {outcomes.n}")
    for seed in outcomes.seeds:
        trained = {row["arm"] for row in rows if row["what"] == "evaluation" and row["seed"] == seed}
        if trained != set(arms):
            differing = ", ".join(sorted(trained ^ set(arms)))
            raise ValueError(f"the arms of seed {seed} in {path} differ in {differing}; change --extra_arms")
    return rows
