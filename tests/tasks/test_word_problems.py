"""Word problems: what they are, and that their golds are right and their splits disjoint."""

import re

import pytest

from logitmix.tasks import SPLITS, WordProblems, load_task
from logitmix.tasks.check import check


def test_every_gold_is_the_value_of_its_solution_and_grades_as_right():
    task = WordProblems(operations="+-*/")
    assert all(part.failures == () for part in check(task))
    for problem in task.problems("train"):
        formula, value = re.search(r"(\d+ [-+*/] \d+) = (\d+)", problem.solution).groups()
        assert eval(formula) == int(value) == int(problem.answer) > 0
        assert all(number in re.findall(r"\d+", problem.question) for number in re.findall(r"\d+", formula))


def test_splits_are_disjoint_for_any_seeds_and_determined_by_the_seed():
    questions = {split: {p.question for p in WordProblems(seed=1).problems(split)} for split in SPLITS}
    assert [len(questions[split]) for split in SPLITS] == [1000, 100, 200]
    train = {p.question for p in WordProblems(seed=2).problems("train")}
    assert not train & (questions["validation"] | questions["test"])
    assert WordProblems(seed=1).problems("test", 5) == WordProblems(seed=1).problems("test")[:5]


def test_operations_are_those_asked_for():
    for operation in "+-*/":
        solutions = [p.solution for p in WordProblems(operations=operation).problems("validation", 20)]
        assert all(f" {operation} " in solution for solution in solutions)
    with pytest.raises(ValueError, match="operations some of"):
        WordProblems(operations="^")


def test_word_sums_are_sums_and_none_is_a_test_question_of_the_word_problems():
    sums, task = load_task("word_sums"), load_task("word_problems")
    assert all(" + " in problem.solution for problem in sums.problems("train"))
    held_out = {problem.question for split in ("validation", "test") for problem in task.problems(split)}
    assert not held_out & {problem.question for problem in sums.problems("train")}
