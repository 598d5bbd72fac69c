"""What a cell may hold: known shapes are opened, everything else is refused with file, row and type."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pytest
from datasets import Dataset

from logitmix.cli.__main__ import main
from logitmix.tasks import BOXED, R1, DataTask, Problem, Task, load_task
from logitmix.tasks.check import check
from logitmix.tasks.rows import open_text, written_by_program

NAN = float("nan")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}]


class Cells(DataTask):
    """Rows that a test gives, as `datasets` or pandas return them."""

    name = "cells"
    hub_id = "a/dataset"
    hub_test = None
    columns = ("question", "answer")
    template = R1

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def _read_hub(self, split):
        return self.rows, self.hub_id

    def problem(self, row):
        return Problem(row["question"], row["answer"], row.get("solution"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


OPENED = [
    ("5", "5"),
    (5, "5"),
    (0.5, "0.5"),
    (["5"], "5"),
    ([5], "5"),
    ([["5"]], "5"),
    ({"ground_truth": "5", "style": "rule"}, "5"),
    ({"ground_truth": ["5"], "style": "rule"}, "5"),
    ({"ground_truth": 5}, "5"),
    ([{"ground_truth": "5"}], "5"),
    ([{"type": "text", "text": "5"}], "5"),
]
NUMPY = [
    (np.int64(5), "5"),
    (np.float32(0.1), "0.1"),
    (np.str_("5"), "5"),
    (np.array(["5"]), "5"),
    (np.array(["5"], dtype=object), "5"),
    (np.array(5), "5"),
    ({"ground_truth": np.array([5])}, "5"),
    (10**400, str(10**400)),
    (("5",), "5"),
    (Decimal("2.50"), "2.50"),
]
REFUSED = [
    (["4", "5"], "a list of 2 values"),
    ([], "a list of 0 values"),
    ({"value": "5"}, "a dict with the keys 'value'"),
    ({}, r"a dict with the keys \(none\)"),
    ({"ground_truth": ["4", "5"]}, "a list of 2 values"),
    ({"ground_truth": {"a": 1}}, "a dict with the keys 'a'"),
    ([{"type": "image", "image": "x.png"}], "a dict with the keys 'type', 'image'"),
    (NAN, "nan"),
    (float("inf"), "inf"),
    (True, "a bool"),
    ("a\ud800b", r"a lone surrogate, '\\ud800', at character 1"),
]
NOT_JSON = [
    (b"5", "a bytes"),
    (np.bool_(True), "a bool"),
    (np.float64("nan"), "nan"),
    (Decimal("nan"), "NaN"),
    (1j, "a complex"),
    (np.array(["4", "5"]), "a list of 2 values"),
    (np.array([]), "a list of 0 values"),
    (datetime.date(2026, 1, 5), "a date"),
    (object(), "an object"),
    ({"5"}, "a set of 1 values"),
]


@pytest.mark.parametrize(("value", "text"), OPENED + NUMPY)
def test_a_known_shape_is_opened_in_a_task_made_in_python(value, text):
    assert Problem("What?", value, value) == Problem("What?", text, text)
    assert type(Problem("What?", value).answer) is str
    (problem,) = Cells([{"question": "What?", "answer": value}]).problems("train")
    assert problem.answer == text


@pytest.mark.parametrize(("value", "text"), OPENED)
def test_a_known_shape_is_opened_in_a_file(value, text, tmp_path):
    row = {"question": value, "answer": value, "why": value}
    task = load_task("jsonl", data=write(tmp_path / "mine.jsonl", row), solution_column="why")
    assert task.problems("train") == [Problem(text, text, text)]


@pytest.mark.parametrize("column", ["question", "answer", "solution"])
@pytest.mark.parametrize(("value", "reason"), REFUSED + NOT_JSON)
def test_another_value_is_refused_with_row_and_type(value, reason, column):
    good = {"question": "What?", "answer": "5", "solution": "Five."}
    with pytest.raises(ValueError, match=rf"row 2 of a/dataset cannot be a problem: the {column}.* (is|has) {reason}"):
        Cells([good, good | {"question": "Which?", column: value}]).problems("train")


@pytest.mark.parametrize("column", ["question", "answer", "why"])
@pytest.mark.parametrize(("value", "reason"), REFUSED)
def test_another_value_is_refused_with_file_row_and_type(value, reason, column, tmp_path):
    good = {"question": "What?", "answer": "5", "why": "Five."}
    path = write(tmp_path / "mine.jsonl", good, good | {"question": "Which?", column: value})
    with pytest.raises(ValueError, match=rf"row 2 of .*mine.jsonl .*(is|has) {reason}"):
        load_task("jsonl", data=path, solution_column="why").problems("train")


@pytest.mark.parametrize("name", ["gsm8k", "hendrycks_math", "cn_k12", "mmlu"])
@pytest.mark.parametrize(("value", "reason"), REFUSED)
def test_a_shipped_task_refuses_another_value(name, value, reason, tmp_path):
    row = {
        "gsm8k": {"question": "What?", "answer": value},
        "hendrycks_math": {"problem": value, "solution": "\\boxed{5}"},
        "cn_k12": {"problem": "What?", "solution": "\\boxed{5}", "answer": value},
        "mmlu": {"question": "What?", "choices": ["1", "2", "3", value], "answer": 1},
    }[name]
    with pytest.raises(ValueError, match=rf"row 1 of .*mine.jsonl .*(is|has) {reason}"):
        load_task(name, data=write(tmp_path / "mine.jsonl", row)).problems("train")


@pytest.mark.parametrize("index", [True, 1.0, "1", None, NAN, 4])
def test_the_answer_of_mmlu_is_an_index(index, tmp_path):
    row = {"question": "What?", "choices": ["1", "2", "3", "4"], "answer": index}
    with pytest.raises(ValueError, match="its answer must be the index of one of its four choices"):
        load_task("mmlu", data=write(tmp_path / "mine.jsonl", row)).problems("train")


def test_the_choices_of_mmlu_are_a_list_also_as_an_array():
    assert open_text(np.array(["x"])) == "x"
    task = load_task("mmlu", data=".")
    row = {"question": "What?", "choices": np.array(["1", "2", "3", "4"]), "answer": np.int64(1)}
    assert task.problem(row).answer == "B"
    with pytest.raises(ValueError, match="the choices is a str, 'abcd'; write a list"):
        task.problem(row | {"choices": "abcd"})


def test_rows_of_verl_in_a_data_set_are_problems():
    rows = Dataset.from_list(
        [
            {"question": CHAT[1:], "answer": {"ground_truth": "5", "style": "rule"}},
            {"question": CHAT, "answer": {"ground_truth": "5", "style": "rule"}},
        ]
    )
    task = Cells(rows)
    task.template = BOXED
    problems = task.problems("train")
    assert problems == [Problem("What is 2+3?", "5"), Problem("What is 2+3?", "5", None, (("system", "Be brief."),))]
    assert task.prompt(problems[1]) == [
        CHAT[0],
        {"role": "user", "content": BOXED.prompt("What is 2+3?")[0]["content"]},
    ]


def test_a_chat_of_one_message_is_a_question_in_any_template(tmp_path):
    task = load_task("jsonl", data=write(tmp_path / "mine.jsonl", {"question": CHAT[1:], "answer": "5"}))
    (problem,) = task.problems("train")
    assert task.prompt(problem) == R1.prompt("What is 2+3?")


def test_a_longer_chat_needs_a_chat_template(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": CHAT, "answer": "5"})
    with pytest.raises(ValueError, match=r"row 1 of .* a chat of 2 messages \(system, user\), but the template 'r1'"):
        load_task("jsonl", data=path).problems("train")
    task = load_task("jsonl", data=path, template="boxed")
    assert [message["role"] for message in task.prompt(task.problems("train")[0])] == ["system", "user"]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([CHAT[1], {"role": "assistant", "content": "5"}], "last message is of the role 'assistant'"),
        ([CHAT[0]], "last message is of the role 'system'"),
        ([{"role": "tool", "content": "5"}, CHAT[1]], "a message of the role 'tool'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}, CHAT[1]], "a message of a field 'tool_calls'"),
        ([{"from": "human", "value": "What?"}], "a dict with the keys 'from', 'value'"),
        (["What is 2+3?", "What is 3+4?"], "a list of 2 values"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], "a list of 2 values"),
        ([{"role": "user", "content": None}], "has no question"),
    ],
)
def test_a_chat_that_is_no_question_is_refused(chat, reason, tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": chat, "answer": "5"})
    with pytest.raises(ValueError, match=f"row 1 of .*{reason}"):
        load_task("jsonl", data=path, template="boxed").problems("train")


def test_equal_questions_after_other_messages_are_other_problems(tmp_path):
    other = [{"role": "system", "content": "Be long."}, CHAT[1]]
    rows = [{"question": chat, "answer": "5"} for chat in (CHAT, other, CHAT)]
    task = load_task("jsonl", data=write(tmp_path / "mine.jsonl", *rows), template="boxed")
    assert len(task.problems("train")) == 2
    assert len(task.dropped["repeats"]) == 1


@pytest.mark.parametrize(
    "text",
    ["['5']", "[\"it's\", 5]", "{'ground_truth': '5'}", "nan", "None", "b'5'", "np.float64(5.0)", "[None]",
     "[True, 1]", "array(['5'], dtype=object)", "[{'role': 'user', 'content': 'What?'}]",
     "<__main__.Answer object at 0x7f00>", '{"ground_truth": "5", "style": null}', '["5", true]'],
)  # fmt: skip
def test_check_task_finds_what_only_programs_write(text):
    class Answers(Cells):
        def problem(self, row):
            return Problem(str(row["question"]), str(row["answer"]), str(row["solution"]))

    for column in ("question", "answer", "solution"):
        row = {"question": "What?", "answer": "5", "solution": "Five."} | {column: text}
        train, *_ = check(Answers([row]))
        assert len(train.failures) == 1, column
        assert "is a program's way to write" in train.failures[0]


@pytest.mark.parametrize(
    "gold",
    ["[1, 2]", "(1, 2)", "{1, 2}", "[[1, 2], [3, 4]]", "(-1, 0.5]", "(A)", "Paris", "yes", "True", "$1,000$",
     "50\\%", "x^2+1", "A, B", "[2,3)", "None of these", "nano", "(1 (2))"],
)  # fmt: skip
def test_check_task_accepts_what_mathematics_and_people_write(gold):
    assert written_by_program(gold) is None
    train, *_ = check(Cells([{"question": "What?", "answer": gold}]))
    assert train.failures == ()


def test_check_task_grades_a_gold_in_another_spelling():
    class Exact(Cells):
        def grade(self, response, problem):
            return super().grade(response, problem)

    row = {"question": "What?", "answer": "b(\\"}  # cut off inside a command
    train, *_ = check(Cells([row]))
    assert train.failures == (r"train 1: the gold 'b(\\' is not matched by $b(\$, the same answer as a formula",)
    assert check(Exact([row]))[0].failures == (), "a task's own grader need not know formulas"


def test_check_task_names_the_row_of_a_lone_surrogate(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", {"question": "a", "answer": "5"}, {"question": "b\udc00", "answer": "5"})
    assert main(["check-task", "jsonl", "--data", str(path)]) == 2
    error = capsys.readouterr().err
    assert "row 2 of" in error
    assert "lone surrogate" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("limit", [10.0, "10", True, 1.5])
def test_a_limit_is_a_whole_number(limit):
    with pytest.raises(ValueError, match=r"limit is .* but must be a whole number"):
        load_task("arithmetic").problems("train", limit)


def test_an_error_of_a_problem_made_in_python_names_the_question():
    with pytest.raises(ValueError, match=r"the answer to 'What is 2\+3\?' is a list of 2 values \(str\)"):
        Problem("What is 2+3?", ["4", "5"])
    assert issubclass(Cells, Task)
