"""The arithmetic task: solutions, splits, the base corpus and demonstrations."""

import re

import pytest

from logitmix.tasks import Arithmetic


def parse_steps(text):
    return [(int(a) + int(b), int(c)) for a, b, c in re.findall(r"^(-?\d+)([+-]\d+)=(-?\d+)$", text, re.MULTILINE)]


def test_each_step_of_a_solution_starts_from_the_previous_result():
    for problem in Arithmetic().problems("test", 300):
        steps = parse_steps(problem.solution)
        assert len(steps) == Arithmetic().terms - 1
        assert all(value == result for value, result in steps)
        assert int(problem.answer) == steps[-1][1] == sum(map(int, re.findall(r"[+-]?\d+", problem.question)))


def test_questions_have_the_given_number_of_terms_and_range():
    questions = [problem.question for problem in Arithmetic(terms=3, largest=30).problems("train", 500)]
    numbers = [[int(number) for number in re.findall(r"\d+", question)] for question in questions]
    assert {len(row) for row in numbers} == {3}
    assert {number for row in numbers for number in row} == set(range(1, 31))


def test_splits_are_disjoint_across_seeds():
    questions = {
        split: {p.question for seed in (0, 1) for p in Arithmetic(seed=seed).problems(split, 2000)}
        for split in ("train", "validation", "test")
    }
    questions["train"] |= {row["prompt"].removesuffix("=?\n") for row in Arithmetic().base_corpus(2000)}
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]


def test_output_depends_on_the_seed_and_limit_takes_the_first_problems():
    first, again, other = Arithmetic(seed=3), Arithmetic(seed=3), Arithmetic(seed=4)
    assert first.problems("test") == again.problems("test") != other.problems("test")
    assert first.problems("test", 10) == first.problems("test")[:10]
    assert first.base_corpus(100) == again.base_corpus(100) != other.base_corpus(100)
    assert first.demonstrations(100) == again.demonstrations(100) != other.demonstrations(100)


def test_the_default_seed_gives_known_problems():
    # Changing these changes every published number of the quickstart.
    assert [p.question for p in Arithmetic().problems("test", 2)] == ["7+6+4-8", "6+5+6-3"]


@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 1.0])
def test_the_base_corpus_is_right_and_boxed_share_of_it_is_formatted(share):
    task = Arithmetic(boxed_share=share)
    problems = {task.prompt(p): p for p in task._draw("train", "0/base", 2000)}
    grades = [task.grade(row["completion"], problems[row["prompt"]]) for row in task.base_corpus(2000)]
    assert all(found.lenient_ok for found in grades)
    assert sum(found.format_ok for found in grades) / len(grades) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_demonstrations_are_right_and_formatted_and_leap_share_of_them_leaps(share):
    task = Arithmetic(leap_share=share)
    problems = task.problems("train", 1000)
    demonstrations = [task.demonstration(problem) for problem in problems]
    assert all(task.grade(text, problem).answer_ok for text, problem in zip(demonstrations, problems, strict=True))
    leaps = [text.startswith(f"{p.question}={p.answer}\n") for text, p in zip(demonstrations, problems, strict=True)]
    assert sum(leaps) / len(leaps) == pytest.approx(share, abs=0.05)
    for text, problem, leap in zip(demonstrations, problems, leaps, strict=True):
        assert leap or text.startswith(problem.solution)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_base_leap_share_of_the_base_corpus_leaps(share):
    rows = Arithmetic(base_leap_share=share).base_corpus(1000)
    leaps = [row["completion"].startswith(row["prompt"].removesuffix("?\n")) for row in rows]
    assert sum(leaps) / len(leaps) == pytest.approx(share, abs=0.05)


def test_the_alphabet_holds_exactly_the_characters_of_all_texts():
    task = Arithmetic(boxed_share=0.5)
    texts = [text for row in task.base_corpus(500) + task.demonstrations(500) for text in row.values()]
    assert set("".join(texts)) == set(task.alphabet)
    assert "".join(sorted(set(task.alphabet))) == task.alphabet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxed_share": 1.5}, "boxed_share is 1.5"),
        ({"leap_share": -0.1}, "leap_share is -0.1"),
        ({"terms": 1}, "terms is 1"),
    ],
)
def test_parameters_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**arguments)


def test_requesting_more_problems_than_exist_is_rejected():
    with pytest.raises(ValueError, match=r"1000 test problems are more than 8, the limit for 2 terms up to 9"):
        Arithmetic(terms=2, largest=9).problems("test", 1000)


def test_an_unknown_split_and_a_limit_below_one_are_rejected():
    with pytest.raises(ValueError, match="no split 'dev'; use one of train, validation, test"):
        Arithmetic().problems("dev")
    with pytest.raises(ValueError, match="limit is 0"):
        Arithmetic().problems("test", 0)
