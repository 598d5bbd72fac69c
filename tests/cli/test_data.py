"""The problems a checkpoint is evaluated on: those given by flags, or else those of the run that made it."""

import json
import shutil
import string
from pathlib import Path

import pytest

from logitmix.cli.__main__ import main
from logitmix.cli.options.data import CheckpointDataArguments, RenderedDataArguments
from logitmix.runs.files import RUN_FILE, read_jsonl
from tests.helpers.commands import error_of, save_member

SMALL = ["--eval_limit", "4", "--max_new_tokens", "2"]


@pytest.fixture
def problems(tmp_path) -> str:
    """A file of problems other than those of the arithmetic task."""
    path = tmp_path / "mine.jsonl"
    rows = [{"sum": f"{n}+{n}", "result": str(2 * n)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made_by_run(folder: Path, **arguments) -> str:
    """A checkpoint in the folder of its run, as `logitmix train` writes it."""
    save_member(folder, len(arguments), string.printable)
    (folder / RUN_FILE).write_text(json.dumps({"arguments": {"command": "train"} | arguments}) + "\n")
    return str(folder)


@pytest.fixture
def run(tmp_path, problems) -> str:
    return made_by_run(
        tmp_path / "run", task="jsonl", data=problems, split_seed=3, question_column="sum", answer_column="result",
        template="boxed_line", solution_column=None, train_limit=9,
    )  # fmt: skip


def prompts(folder: Path) -> set[str]:
    return {row["prompt"] for row in read_jsonl(folder / "responses.jsonl")}


@pytest.mark.parametrize("checkpoint", ["run", "run/checkpoint-4"])
def test_an_evaluation_takes_the_task_of_the_run(run, checkpoint, tmp_path):
    if checkpoint != "run":
        shutil.copytree(run, tmp_path / checkpoint, ignore=shutil.ignore_patterns(RUN_FILE, "checkpoint-*"))
    out = tmp_path / "out"
    assert main(["eval", "--model_name_or_path", str(tmp_path / checkpoint), "--output_dir", str(out), *SMALL]) == 0
    arguments = read_jsonl(out / RUN_FILE)[-1]["arguments"]
    assert (arguments["task"], arguments["split_seed"], arguments["question_column"]) == ("jsonl", 3, "sum")
    assert "train_limit" not in arguments
    given = ["--task", "jsonl", "--data", arguments["data"], "--split_seed", "3", "--question_column", "sum"]
    given += ["--template", "boxed_line"]
    given += ["--answer_column", "result", "--output_dir", str(tmp_path / "given"), *SMALL]
    assert main(["eval", "--model_name_or_path", str(tmp_path / checkpoint), *given]) == 0
    assert prompts(out) == prompts(tmp_path / "given")


def test_the_run_of_a_checkpoint_is_found_by_any_path(run, tmp_path, monkeypatch):
    checkpoint = Path(run) / "checkpoint-4"
    checkpoint.mkdir()
    (tmp_path / "latest").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint)
    for path in (".", str(tmp_path / "latest")):
        assert CheckpointDataArguments().resolve(path).split_seed == 3


def test_flags_override_the_run(run):
    assert CheckpointDataArguments(split_seed=5).resolve(run).split_seed == 5
    assert CheckpointDataArguments(split_seed=5).resolve(run).question_column == "sum"
    assert CheckpointDataArguments(task="jsonl").resolve(run).split_seed == 3, "the task of the run: its splits apply"
    own = CheckpointDataArguments(task="arithmetic").resolve(run)
    assert (own.data, own.split_seed, own.question_column) == (None, 0, None), "the run used another task"


def test_without_a_run_it_is_the_arithmetic_task(tmp_path):
    assert CheckpointDataArguments().resolve("no/such/folder", None).task == "arithmetic"
    assert CheckpointDataArguments().resolve(save_member(tmp_path / "model", 0)).split_seed == 0


@pytest.mark.parametrize(
    "line", ['{"x": 1}', "[1]", "null", '{"arguments": null}', '{"arguments": {"task": null}}', ""]
)
def test_run_files_of_other_programs_are_ignored(line, tmp_path):
    folder = save_member(tmp_path / "model", 0)
    (Path(folder) / RUN_FILE).write_text(line + "\n" if line else "")
    assert CheckpointDataArguments().resolve(folder) == RenderedDataArguments()


def test_runs_may_differ_in_the_column_of_solutions_which_only_sft_reads(run, problems, tmp_path):
    arguments = read_jsonl(Path(run) / RUN_FILE)[-1]["arguments"]
    sft = made_by_run(tmp_path / "sft", **arguments | {"command": "sft", "solution_column": "worked"})
    assert CheckpointDataArguments().resolve(sft, run) == CheckpointDataArguments().resolve(run)


def test_checkpoints_of_runs_on_different_problems_need_a_task(run, tmp_path, capsys):
    other = made_by_run(tmp_path / "other", task="arithmetic", split_seed=0)
    message = error_of(capsys, ["complement", run, other, *SMALL])
    assert f"the run of {run} had task 'jsonl', and that of {other} 'arithmetic'; choose one with --task" in message
    assert main(["complement", run, other, "--task", "arithmetic", "--eval_limit", "8", "--max_new_tokens", "2"]) == 0
    assert main(["sweep", "--model_name_or_path", run, "--anchor", other, "--alphas", "0.5", *SMALL]) == 2
