"""The examples run as their docstrings say, on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from logitmix.cli.__main__ import main
from tests.helpers.paths import ROOT

EXAMPLES = ROOT / "examples"


def run_script(name: str, *arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True, text=True, timeout=1200, cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_trl_script_trains_and_saves_a_mixture(members, tmp_path):
    base, sft = members
    printed = run_script(
        "trl_script.py", "--policy", base, "--anchor", sft, "--max_steps", "1", "--use_cpu", cwd=tmp_path
    )
    assert printed.splitlines()[-1] == "the mixture is in run: alpha 0.5"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weights"] == [0.5, 0.5]


def test_the_trl_scripts_reward_reads_the_last_box():
    import trl_script

    completions = ["3+4=7\n\\boxed{7}", "\\boxed{8}", "7", "\\boxed{8}\\boxed{7}"]
    assert trl_script.reward(completions, ["7"] * 4) == [1.0, 0.0, 0.0, 1.0]
    for row in trl_script.questions(20):
        assert row["prompt"].endswith("=?\n")
        assert eval(row["prompt"].removesuffix("=?\n")) == int(row["answer"])


def test_the_custom_task_grades_its_own_golds(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    assert main(["check-task", "custom_task.Weekdays"]) == 0
    assert "failures: 0" in capsys.readouterr().out


def test_the_custom_tasks_splits_share_no_question():
    from custom_task import SIZES, Weekdays

    task = Weekdays()
    questions = {split: {p.question for p in task.problems(split)} for split in SIZES}
    assert {split: len(found) for split, found in questions.items()} == SIZES
    assert not questions["train"] & (questions["validation"] | questions["test"])


def test_each_specialist_is_right_in_its_own_skill_only():
    from specialists import MEMBERS, Products

    task = Products()
    asked = {problem.question for split in ("validation", "test") for problem in task.problems(split)}
    for member in MEMBERS:
        right = {"product": 0, "sum": 0, "format": 0}
        for row in (rows := task.corpus(member, 300)):
            question, product, total, *end = row["completion"].replace("=", "\n").split("\n")
            assert row["prompt"].removesuffix("=?\n") not in asked
            right["product"] += eval(question) == int(product)
            right["sum"] += eval(total) == int(end[0])
            right["format"] += end[1] == f"\\boxed{{{end[0]}}}"
        skill = {"formatter": "format", "multiplier": "product", "adder": "sum"}[member]
        assert right.pop(skill) == len(rows)
        assert max(right.values()) < len(rows) / 2


@pytest.mark.slow
def test_the_specialists_are_trained_mixed_and_swept(tmp_path):
    printed = run_script("specialists.py", "--steps", "2", "--eval_limit", "4", cwd=tmp_path)
    assert "chosen on every second problem" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["product", "sum", "format", "end"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra 'checks' is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra 'checks' is not installed")
    pytest.importorskip("ipykernel", reason="the extra 'checks' is not installed")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    sizes = notebook.cells[1]
    assert sizes.source.startswith("SIZES = {")
    small = {"base_steps": 6, "sft_steps": 3, "rl_steps": 1, "questions": 4, "eval_limit": 4}
    sizes.source = f"SIZES = {small}\nFOLDER = 'runs/notebook'"
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[9].outputs)
    assert [line.split()[0] for line in printed.splitlines()] == ["0.0", "0.3", "0.5", "1.0"]
    assert (tmp_path / "runs" / "notebook" / "inspect.html").exists()
