"""Training runs for a report: read from their folders, grouped by arm, and turned into curves."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from logitmix.runs.files import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE, read_jsonl

# Two runs that differ only in these arguments are two seeds of one arm
IGNORED_ARGUMENTS = {
    *("seed", "data_seed", "output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "max_steps"),
    *("num_train_epochs", "report_to", "disable_tqdm", "hub_model_id", "hub_token"),
}


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder.

    label:   the arm that the user named, if any
    updates: in an outer step
    named:   whether the user named the folder itself, and not one around it
    """

    folder: Path
    label: str | None
    arguments: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    updates: float = 1.0
    named: bool = True

    @property
    def name(self) -> str | None:
        """The model whose held-out accuracy is reported: the mixture, or the model if there is no anchor.

        None without evaluations.
        """
        names = {row["name"] for row in self.evaluations}
        return "mixture" if "mixture" in names else min(names, default=None)

    @property
    def trains_by_reward(self) -> bool:
        return bool(self.evaluations) or any("reward" in row for row in self.metrics)

    @cached_property
    def logged(self) -> set[str]:
        """The names of all metrics, which every panel asks for."""
        return {key for row in self.metrics for key in row}

    @property
    def is_drawn(self) -> bool:
        """Whether any panel shows a number of the run."""
        return any(points(self, panel.source, key) for panel in PANELS for key in panel_keys(panel, [self]))

    @property
    def progress(self) -> str:
        """The last recorded step, and of how many if the run is unfinished."""
        last = max(row["step"] for row in (*self.evaluations, *self.metrics))
        of = self.arguments.get("max_steps") or 0
        return f"{last} of {of} so far" if last < of else str(last)


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in the seed."""

    label: str
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Curve:
    """A quantity of an arm by outer step: its mean, lowest and highest value over the seeds that reached the step."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


@dataclass(frozen=True)
class Line:
    """A curve in a panel; an arm has the same style in every panel, and `variant` distinguishes its lines."""

    label: str
    curve: Curve
    arm: int
    variant: int


@dataclass(frozen=True)
class Panel:
    """One figure: file name, title and y axis with its limits; which numbers it shows, and their factor.

    `source` is `"metrics"`, or the model whose evaluations are shown: `"main"` for the reported one, or its name.
    """

    file: str
    title: str
    axis: str
    keys: tuple[str, ...]
    source: str = "metrics"
    factor: float = 1.0
    limits: tuple[float, float] | None = None


PER_CENT: dict[str, Any] = {"factor": 100, "limits": (-2, 102)}
PANELS = (
    Panel("answer", "Held-out accuracy", "answer-correct, greedy (%)", ("answer",), "main", **PER_CENT),
    Panel("format", "Held-out format", "format-correct, greedy (%)", ("format",), "main", **PER_CENT),
    Panel(
        "policy",
        "Held-out accuracy of the policy alone",
        "answer-correct, greedy (%)",
        ("answer",),
        "policy",
        **PER_CENT,
    ),
    Panel(
        "alpha", "Weight of the anchor", "alpha (0: policy alone, 1: anchor alone)", ("alpha",), limits=(-0.02, 1.02)
    ),
    Panel("validation", "Forgetting (s1) and gain (s2)", "validation questions", ("validation/s1", "validation/s2")),
    Panel("reward", "Training reward", "mean reward", ("reward",)),
    Panel(
        "answer_rate",
        "Right rollouts",
        "right, sampled (%); lenient: in any format",
        ("answer_rate", "lenient_rate"),
        **PER_CENT,
    ),
    Panel("groups", "Groups without spread of rewards", "of all (%)", ("groups/without_spread",), **PER_CENT),
    Panel("format_rate", "Format of the rollouts", "format-correct, sampled (%)", ("format_rate",), **PER_CENT),
    Panel(
        "kl",
        "KL of the mixture to policy and anchor; kl: GRPO's penalty",
        "nats a token",
        ("mixture/kl_policy", "mixture/kl_anchor", "kl"),
    ),
    Panel("length", "Length of the rollouts", "tokens", ("completions/mean_length",)),
    Panel("cut", "Rollouts cut at the limit", "of all (%)", ("completions/clipped_ratio",), **PER_CENT),
    Panel("entropy", "Entropy", "nats a token", ("entropy",)),
    Panel("loss", "Loss", "loss of the update", ("loss",)),
    Panel("grad_norm", "Gradient", "norm, before it is clipped", ("grad_norm",)),
)


LOGS = (EVALUATIONS_FILE, METRICS_FILE)


def read_runs(argument: str) -> list[Run]:
    """The run in a folder, or all runs in its subfolders; `NAME=` before the folder names the arm.

    A run may have logged nothing yet (`Run.is_drawn`).

    Raises `ValueError` for a folder that does not exist or holds no run.
    """
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).is_dir():
        label, path = "", argument
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder; give the --output_dir of a training run")
    if any((folder / name).exists() for name in LOGS):
        return [_read(folder, label)]
    inside = sorted({file.parent for name in LOGS for file in folder.glob(f"*/{name}")})
    if not inside and not (folder / RUN_FILE).exists():
        raise ValueError(
            f"{path} holds no run with rewards or evaluations (neither {METRICS_FILE} nor {EVALUATIONS_FILE}); give "
            "the --output_dir of a training run, or a folder of them"
        )
    return [replace(_read(inner, label), named=False) for inner in inside] or [_read(folder, label)]


def _read(folder: Path, label: str) -> Run:
    lines = {
        name: read_jsonl(folder / name) if (folder / name).exists() else []
        for name in (RUN_FILE, EVALUATIONS_FILE, METRICS_FILE)
    }
    arguments = lines[RUN_FILE][-1]["arguments"] if lines[RUN_FILE] else {}
    updates = count_updates(arguments)
    return Run(folder, label or None, arguments, lines[EVALUATIONS_FILE], lines[METRICS_FILE], updates)


def count_updates(arguments: Mapping[str, Any]) -> float:
    """The number of updates in an outer step of GRPO with these arguments; 1 for other trainings, which have none."""
    per_generation = arguments.get("steps_per_generation")
    if per_generation is None:
        return 1.0
    accumulated = arguments.get("gradient_accumulation_steps") or 1
    return float(per_generation * (arguments.get("num_iterations") or 1) / accumulated)


def group_by_arm(runs: Iterable[Run]) -> list[Arm]:
    """Runs grouped by arm: by name if they have one, otherwise by their arguments."""
    arms: dict[Any, Arm] = {}
    taken: set[str] = set()
    for run in runs:
        key: Any = run.label
        if key is None:
            arguments = [f"{k}={v!r}" for k, v in sorted(run.arguments.items()) if k not in IGNORED_ARGUMENTS]
            key = tuple(arguments) or run.folder
        if key not in arms:
            label = run.label or run.folder.name
            if label in taken:
                label = str(run.folder)
            taken.add(label)
            arms[key] = Arm(label)
        arms[key].runs.append(run)
    return list(arms.values())


def points(run: Run, source: str, key: str) -> dict[float, float]:
    """A quantity of a run by outer step, at the steps where the run recorded it; see `Panel` for `source`."""
    if source == "metrics":
        rows = run.metrics
    else:
        name = run.name if source == "main" else source
        rows = [row for row in run.evaluations if row["name"] == name]
    return {row["step"] / run.updates: float(row[key]) for row in rows if isinstance(row.get(key), int | float)}


def curve(arm: Arm, source: str, key: str, factor: float = 1.0) -> Curve | None:
    """The arm's curve of a quantity, or None if no run has it."""
    by_run = [found for found in (points(run, source, key) for run in arm.runs) if found]
    if not by_run:
        return None
    steps = sorted({step for found in by_run for step in found})
    at = [[factor * found[step] for found in by_run if step in found] for step in steps]
    return Curve(
        steps, [sum(v) / len(v) for v in at], [min(v) for v in at], [max(v) for v in at], seeds=len(by_run)
    )  # fmt: skip


def panel_keys(panel: Panel, runs: Iterable[Run]) -> list[str]:
    """The keys of a panel, and after each those of several anchors, such as `mixture/kl_anchor_0`."""
    logged = {key for run in runs for key in run.logged} if panel.source == "metrics" else set()
    keys = []
    for key in panel.keys:
        keys += [key, *sorted(found for found in logged if re.fullmatch(rf"{key}_\d+", found))]
    return keys


def panel_lines(panel: Panel, arms: Sequence[Arm]) -> list[Line]:
    """The lines of a panel; empty if no run has its numbers."""
    lines = []
    keys = panel_keys(panel, [run for arm in arms for run in arm.runs])
    for (i, arm), (variant, key) in itertools.product(enumerate(arms), enumerate(keys)):
        found = curve(arm, panel.source, key, panel.factor)
        if found is not None:
            what = f": {key.rpartition('/')[2]}" if len(keys) > 1 else ""
            seeds = f", {found.seeds} seeds" if found.seeds > 1 else ""
            lines.append(Line(f"{arm.label}{what}{seeds}", found, i, variant))
    return lines
