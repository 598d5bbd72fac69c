"""MATH: on the real data if it is available, and on small files and a stubbed hub."""

import json
import random

import pytest

from logitmix.tasks import answers_match, load_task
from tests.helpers.paths import SHARED

MATH = SHARED / "data" / "math"
needs_math = pytest.mark.skipif(not MATH.exists(), reason=f"the MATH data is not at {MATH}")
SPLITS = ("train", "validation", "test")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(count, start=0):
    return [
        {"problem": f"What is ${n}+1$?", "solution": f"It is $\\boxed{{{n + 1}}}$."}
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def math():
    return load_task("hendrycks_math", data=MATH)


@needs_math
def test_disjoint_splits_hold_all_problems_but_two_near_duplicates(math):
    questions = {split: {problem.question for problem in math.problems(split)} for split in SPLITS}
    assert [len(questions[split]) for split in SPLITS] == [6998, 500, 500]
    assert len(set.union(*questions.values())) == 7998
    near = [problem.question for problem in math.dropped["near-duplicates of test"]]
    assert len(near) == 2
    assert "How many integers are there in the solution set of $|x-2| \\leq 5.6$?" in near
    assert math.dropped["repeats"] == []


@needs_math
def test_every_demonstration_grades_as_right(math):
    problems = [problem for split in SPLITS for problem in math.problems(split)]
    failures = [p.answer for p in problems if not math.grade(math.demonstration(p), p).answer_ok]
    assert failures == []


@needs_math
def test_restyled_golds_match(math):
    golds = [problem.answer for split in SPLITS for problem in math.problems(split)]
    sample = random.Random(0).sample([gold for gold in golds if not gold.lstrip("-").isdigit()], 500)
    rewritten = [("$ " + gold.replace("\\frac", "\\dfrac").replace(",", ", ") + " $.", gold) for gold in sample]
    assert [pair for pair in rewritten if not answers_match(*pair)] == []


@needs_math
def test_the_gold_of_another_problem_does_not_match(math):
    golds = [problem.answer for problem in math.problems("test")]
    shifted = golds[1:] + golds[:1]
    pairs = [(wrong, gold) for wrong, gold in zip(shifted, golds, strict=True) if wrong != gold]
    assert len(pairs) > 450
    assert [pair for pair in pairs if answers_match(*pair)] == [("x=5", "5")], "the only neighbours with equal answers"


@needs_math
def test_off_by_one_and_negated_integers_do_not_match(math):
    golds = [p.answer for split in SPLITS for p in math.problems(split) if p.answer.lstrip("-").isdigit()]
    assert len(golds) > 4000
    for gold in golds:
        assert not answers_match(str(int(gold) + 1), gold)
        assert int(gold) == 0 or not answers_match(str(-int(gold)), gold)


@needs_math
def test_the_seed_determines_the_validation_split(math):
    again, other = (load_task("hendrycks_math", data=MATH, seed=seed) for seed in (0, 1))
    assert math.problems("validation") == again.problems("validation") != other.problems("validation")
    assert math.problems("train", 5) == math.problems("train")[:5]


def test_gold_is_the_last_box_or_the_answer_column(tmp_path):
    rows = [
        {"problem": "a", "solution": "\\boxed{1}, so $\\boxed{\\frac{1}{2}}$."},
        {"problem": "b", "solution": "see above", "answer": "7"},
        {"problem": "c", "solution": "$\\boxed{3}$", "answer": None},
    ]
    task = load_task("hendrycks_math", data=write(tmp_path / "mine.jsonl", rows))
    assert [problem.answer for problem in task.problems("train")] == ["\\frac{1}{2}", "7", "3"]


def test_one_file_is_split_into_three_disjoint_parts(tmp_path):
    task = load_task("hendrycks_math", data=write(tmp_path / "mine.jsonl", make_rows(100)))
    found = [task.problems(split) for split in SPLITS]
    assert [len(problems) for problems in found] == [81, 9, 10]
    assert len({problem.question for problems in found for problem in problems}) == 100


def test_a_training_question_that_is_also_in_test_is_dropped(tmp_path):
    write(tmp_path / "train.jsonl", make_rows(20))
    write(tmp_path / "test500.jsonl", make_rows(5, start=18))
    task = load_task("hendrycks_math", data=tmp_path)
    assert len(task.problems("train")) + len(task.problems("validation")) == 18
    assert len(task.problems("test")) == 5


def test_demonstration_is_the_human_solution_then_the_answer(tmp_path):
    task = load_task("hendrycks_math", data=write(tmp_path / "mine.jsonl", make_rows(1)))
    problem = task.problems("train")[0]
    assert task.demonstration(problem) == " It is $\\boxed{1}$. </think> <answer>1</answer>"
    assert task.demonstrations() == [{"prompt": task.prompt(problem), "completion": task.demonstration(problem)}]


def test_without_data_the_hub_is_read(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: make_rows(3, start=0 if split == "train" else 50))
    task = load_task("hendrycks_math")
    assert [problem.answer for problem in task.problems("test")] == ["51", "52", "53"]


def test_a_failed_download_names_both_ways_out(monkeypatch):
    import datasets

    def offline(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"Maxwell-Jia/MATH .*connect to the network .*or give data \(--data\)"):
        load_task("hendrycks_math").problems("train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "a", "solution": "b"}],
            "row 1 of .* has no column 'problem', only 'question', 'solution'",
        ),
        ([{"problem": "a"}], "row 1 of .* has no column 'solution', only 'problem'"),
        (
            [*make_rows(1), {"problem": "a", "solution": "b"}],
            "row 2 of .* has no answer; give it a column 'answer'",
        ),
        ([], "holds no problems"),
    ],
)
def test_bad_rows_are_rejected_by_number(tmp_path, rows, message):
    task = load_task("hendrycks_math", data=write(tmp_path / "mine.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        task.problems("train")


def test_a_file_that_is_not_json_lines_is_rejected(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("problem,solution\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl is not JSON lines"):
        load_task("hendrycks_math", data=path).problems("train")


def test_missing_paths_and_empty_splits_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a folder .* or leave data out to download"):
        load_task("hendrycks_math", data=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no train\*\.jsonl; give a folder with train\*\.jsonl and test\*"):
        load_task("hendrycks_math", data=tmp_path).problems("test")
    with pytest.raises(ValueError, match=r"the validation split of .* is empty"):
        load_task("hendrycks_math", data=write(tmp_path / "mine.jsonl", make_rows(3))).problems("validation")


def test_a_problem_without_a_solution_cannot_be_demonstrated(tmp_path):
    data = write(tmp_path / "mine.jsonl", [{"problem": "a", "solution": "", "answer": "1"}])
    task = load_task("hendrycks_math", data=data)
    with pytest.raises(ValueError, match="the problem 'a' has no solution to demonstrate"):
        task.demonstration(task.problems("train")[0])


def test_an_unknown_task_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="no task 'hendryks-math'; did you mean 'hendrycks_math'"):
        load_task("hendryks-math")


def test_the_arithmetic_task_takes_no_data():
    with pytest.raises(ValueError, match=r"reads no data, but data is here\.jsonl"):
        load_task("arithmetic", data="here.jsonl")
