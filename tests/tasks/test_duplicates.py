"""Near-duplicates: a reworded problem is found, a similar but different one is not."""

import time

import pytest

from logitmix.tasks.base import Problem
from logitmix.tasks.duplicates import near_duplicates

SET = Problem("How many integers are in the solution set of $|x-2|\\leq5.6$ ?", "11")
# Many questions of MATH begin alike, which gives their first words little weight
OTHERS = [Problem(f"What is the value of the {word}?", "1") for word in ("sum", "product", "root", "mean")]


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("How many integers are there in the solution set of $|x-2| \\leq 5.6$?", "11", True),
        ("How many integers are in the solution set of $|x-2| \\leq 5.6$", "11.0", True),
        ("How many integers are in the solution set of $|x-2| \\leq 5.7$?", "11", False),
        ("How many integers are in the solution set of $|x+2| \\leq 5.6$?", "11", False),
        ("How many integers are in the solution set of $|y-2| \\leq 5.6$?", "11", False),
        ("How many integers are in the solution set of $|x-2| \\leq 5.6$?", "12", False),
        ("Find all whole numbers with $|x-2| \\leq 5.6$.", "11", False),
    ],
)
def test_wording_may_differ_but_not_numbers_signs_or_answer(question, answer, found):
    problem = Problem(question, answer)
    assert near_duplicates([problem, *OTHERS], [SET]) == ([(problem, SET)] if found else [])


def test_phrases_common_to_the_whole_data_set_do_not_count():
    frame = "For which of these two scenarios does the main character do something clearly morally wrong? {} A. Wrong"
    acts = ["I broke his record player", "I fed the stray dog", "I read a long book", "She sold the red car"]
    train, test = ([Problem(frame.format(act), "A") for act in part] for part in (acts[:2], acts[2:]))
    assert near_duplicates(train, test) == []


def test_empty_splits_have_no_near_duplicates():
    assert near_duplicates([SET], []) == []
    assert near_duplicates([], [SET]) == []


def test_thousands_of_problems_take_seconds():
    words = [f"w{n:04d}" for n in range(500)]
    problems = [Problem(" ".join(words[(n * k) % 500] for k in range(1, 40)), str(n)) for n in range(1, 6001)]
    start = time.process_time()
    near_duplicates(problems[:5500], problems[5500:])
    assert time.process_time() - start < 20
