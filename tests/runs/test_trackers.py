"""Trackers of `--report_to`: they receive everything that a report plots, and a missing one is reported at once."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitmix.evaluation.report.curves import PANELS
from tests.helpers.commands import TINY, error_of

RATES = ("answer", "format", "lenient", "truncated", "mean_length")
# of a run with a mixture; `kl` is that of an arm with a penalty
PLOTTED = {f"train/{key}" for panel in PANELS if panel.source == "metrics" for key in panel.keys} - {"train/kl"}


@pytest.fixture
def train(members, tmp_path):
    """A command that trains two steps with validation and evaluates before, between and after."""
    base, sft = members
    return [
        "train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run"), *TINY,
        "--alpha_controller", "adaptive", "--validation_size", "4", "--max_steps", "2", "--eval_every", "1",
        "--eval_limit", "6", "--gradient_accumulation_steps", "1", "--steps_per_generation", "1",
    ]  # fmt: skip


def run(argv, **environment) -> None:
    """In a new process, since trackers read their settings from the environment when they are imported."""
    command = [sys.executable, "-m", "logitmix.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=480)
    assert done.returncode == 0, done.stderr


def evaluations(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of the held-out evaluations that a tracker should show, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "evaluations.jsonl").read_text().splitlines():
        row = json.loads(line)
        for rate in RATES:
            points.setdefault(f"eval/{row['name']}_{rate}", []).append((row["step"], row[rate]))
    return points


def assert_same_points(found, expected) -> None:
    assert found.keys() >= expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        for (_, value), (_, other) in zip(found[name], points, strict=True):
            assert math.isclose(value, other, rel_tol=1e-6), name  # TensorBoard keeps float32


def test_tensorboard_gets_what_the_report_plots(train, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard, to test it as a tracker")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run([*train, "--report_to", "tensorboard"], TENSORBOARD_LOGGING_DIR=str(tmp_path / "board"))
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found.keys() >= PLOTTED
    assert_same_points(found, evaluations(tmp_path / "run"))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [key for line in metrics for key in line if key.startswith("eval_")], "they are in evaluations.jsonl"


def test_trackio_gets_what_the_report_plots(train, tmp_path):
    pytest.importorskip("trackio", reason="pip install trackio, to test it as a tracker")
    run(
        [*train, "--report_to", "trackio", "--project", "ours", "--run_name", "a"],
        TRACKIO_DIR=str(tmp_path / "trackio"),
    )
    ask = "import json, trackio.sqlite_storage as s; print(json.dumps(s.SQLiteStorage.get_logs('ours', 'a')))"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    rows = json.loads(subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True))
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if "train/global_step" in row:
                found.setdefault(key, []).append((row["train/global_step"], value))
    assert found.keys() >= PLOTTED
    assert_same_points(found, evaluations(tmp_path / "run"))


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_a_tracker_that_is_not_installed_is_rejected_before_anything_is_written(verb, train, tmp_path, capsys):
    absent = next(name for name in ("swanlab", "clearml", "wandb") if importlib.util.find_spec(name) is None)
    argv = [*train, "--report_to", absent]
    if verb == "sft":
        argv = ["sft", *train[1:3], "--output_dir", str(tmp_path / "run"), *TINY[:4], "--report_to", absent]
    message = error_of(capsys, argv)
    assert f"report_to is {absent!r}, which cannot be used here: " in message
    assert "install" in message
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_rejected(train, capsys):
    assert "report_to is 'wandbb', which cannot be used here" in error_of(capsys, [*train, "--report_to", "wandbb"])
