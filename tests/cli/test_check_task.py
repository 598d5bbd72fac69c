"""`logitmix check-task`: the table, the failures, the exit status."""

import json

import pytest

from logitmix.cli.__main__ import main
from tests.helpers.paths import SHARED

DATA = SHARED / "data"

MINE = """
from logitmix.tasks import R1, Problem, Task
from logitmix.tasks.base import validate_request


class {name}(Task):
    name = "doubles"
    template = R1

    def __init__(self, seed=0):
        self.seed = seed

    def problems(self, split, limit=None):
        validate_request(split, limit)
        start = {{"train": 0, "validation": 10, "test": 20}}[split]
        return [Problem(f"Twice {{n}}?", {answer}, f"{{n}}+{{n}}") for n in range(start, start + 10)][:limit]
"""


def lines_of(printed: str) -> list[list[str]]:
    """The table's rows, as cells."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in printed.splitlines() if "│" in line]


def test_a_shipped_task(capsys):
    assert main(["check-task", "arithmetic"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("arithmetic, template boxed_line, seed 0")
    assert ["train", "20,000", "20,000"] in lines_of(printed)
    assert ["all", "21,000", "21,000"] in lines_of(printed)
    assert printed.endswith("failures: 0\n")


@pytest.mark.skipif(not DATA.exists(), reason=f"the real data is not at {DATA}")
def test_what_was_dropped_from_math_is_shown(capsys):
    assert main(["check-task", "hendrycks_math", "--data", str(DATA / "math")]) == 0
    printed = capsys.readouterr().out
    assert ["near-duplicates of test", "2", "2"] in lines_of(printed)
    assert ["all", "8,000", "8,000"] in lines_of(printed)
    assert "dropped, nearly in test: How many integers are there in the solution set of $|x-2| \\leq 5.6$?" in printed


def test_a_custom_file_in_a_custom_template(tmp_path, capsys):
    rows = [{"q": f"What is {n} plus {n}?", "a": 2 * n} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\n"
        'prompt_format: "Q: {question}\\nA:"\n'
        'completion_format: "{solution}\\nANSWER: {answer}\\n"\n'
        "pattern: '.*\\nANSWER: (?P<answer>[^\\n]*)\\n'\n"
    )
    flags = ["--data", str(tmp_path / "mine.jsonl"), "--question_column", "q", "--answer_column", "a"]
    assert main(["check-task", "jsonl", *flags, "--template", str(tmp_path / "mine.yaml")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("jsonl, template mine, seed 0")
    assert ["all", "20", "20"] in lines_of(printed)


def test_a_custom_task_from_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sound_task.py").write_text(MINE.format(name="Doubles", answer="str(2 * n)"))
    assert main(["check-task", "sound_task.Doubles"]) == 0
    assert ["all", "30", "30"] in lines_of(capsys.readouterr().out)


def test_every_failure_is_listed_and_the_exit_status_is_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    unsound = "str(2 * n) if n % 10 else '</answer>'"
    (tmp_path / "unsound_task.py").write_text(MINE.format(name="Doubles", answer=unsound))
    assert main(["check-task", "unsound_task.Doubles"]) == 1
    printed = capsys.readouterr().out
    assert ["train", "10", "9"] in lines_of(printed)
    for split in ("train", "validation", "test"):
        assert f"{split} 1: the template 'r1' stops at '</answer>'" in printed
    assert printed.endswith("failures: 3\n")


def test_an_empty_split_is_a_failure(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"question": "What is 1 plus 1?", "answer": "2"}\n')
    assert main(["check-task", "jsonl", "--data", str(tmp_path / "mine.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert "the validation split of" in printed
    assert "the test split of" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["arithmetics"], "did you mean 'arithmetic'"),
        (["jsonl"], "give data (--data)"),
        (["arithmetic", "--template", "r2"], "there is no template 'r2'; did you mean 'r1'?"),
        (["arithmetic", "--template", "no.yaml"], "the template file no.yaml does not exist"),
        (["arithmetic", "--answer_column", "a"], "does not choose its columns"),
        (
            ["arithmetic", "--num_questions", "5"],
            "num_questions is 5, but no model is tried",
        ),
    ],
)
def test_wrong_input_prints_one_error_line(argv, message, capsys):
    assert main(["check-task", *argv]) == 2
    assert message in capsys.readouterr().err
