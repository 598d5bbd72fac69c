"""The verifier: equal answers match, wrong ones do not, and hostile ones are rejected quickly."""

import subprocess
import sys
import threading
import time

import pytest

from logitmix.tasks import BOXED_LINE, R1, Grade, answers_match, grade


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("42", "42"),
        (" 42. ", "42"),
        ("1,000", "1000"),
        ("112,\\!875", "112875"),
        ("10{,}000", "10,000"),
        ("-3.50", "-3.5"),
        ("+7", "7"),
        ("\\$40", "40"),
        ("$\\boxed{5}$", "5"),
        ("\\boxed{5}", "5"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\text{Evelyn}", "Evelyn"),
        ("even", "\\text{Even}"),
    ],
)
def test_other_spellings_of_the_same_tokens_match(prediction, gold):
    assert answers_match(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("(x^2+1)^2(y^3-1)", "(y^3-1)(x^2+1)^2"),
        ("x^2y^3", "y^3x^2"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac{2}{4}", "\\frac{1}{2}"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("1 + 2x", "2x+1"),
        ("5", "x=5"),
        ("2^{11}", "2048"),
    ],
)
def test_answers_of_equal_value_match(prediction, gold):
    assert answers_match(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("43", "42"),
        ("-42", "42"),
        ("4 2", "42"),
        ("", "42"),
        ("", ""),
        (".", "."),
        ("0.3333333", "0.3333334"),
        ("\\frac{2}{1}", "\\frac{1}{2}"),
        ("(1,2)", "(2,1)"),
        ("(1,2]", "(1,2)"),
        ("x+1", "x+2"),
        ("\\text{seat}", "\\text{east}"),
        ("left", "felt"),
        ("5 or 6", "5"),
    ],
)
def test_wrong_answers_do_not_match(prediction, gold):
    assert not answers_match(prediction, gold)


def test_the_reward_requires_the_format_and_the_right_answer():
    right = "1+2=3\n\\boxed{3}"
    assert grade(right, "3", BOXED_LINE) == Grade(True, True, True, "3", None)
    assert grade("1+2=4\n\\boxed{4}", "3", BOXED_LINE) == Grade(True, False, False, "4", None)
    assert grade("1+2=3\nso 3", "3", BOXED_LINE) == Grade(False, False, True, "3", None)
    assert grade("no idea", "3", BOXED_LINE) == Grade(False, False, False, None, None)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("</think> <answer>1</answer> or <answer>\\frac{1}{2}</answer>", "\\frac{1}{2}"),
        ("so it is $\\boxed{\\frac{1}{2}}$ of 7", "\\frac{1}{2}"),
        ("first 3, then 1,250.5.", "1,250.5"),
        ("it falls to -4", "-4"),
    ],
)
def test_lenient_grading_searches_answer_blocks_then_boxes_then_numbers(response, answer):
    found = grade(response, answer, R1)
    assert (found.format_ok, found.answer_ok, found.lenient_ok, found.answer) == (False, False, True, answer)


HOSTILE = [
    "9^{9^{9^9}}",
    "9**9**9**9",
    "9^(9^(9^9))",
    "9^{(1)+9^9}",
    "9^9^9^9",
    "9^{-9}^{9^9}",
    "((((9^{99})^{99})^{99})^{99})",
    "(((((((9^9)^9)^9)^9)^9)^9)^9)",
    "2^{123456789}",
    "9!!!!",
    "99999999!",
    "(9!)!",
    "\\binom{99999999}{44444444}",
    "\\int_0^1 x^x dx",
    "\\sum_{i=1}^{99999999} i^i",
    "(" * 200 + "1" + ")" * 200,
    "\\frac{1}{" * 60 + "1" + "}" * 60,
    "1\x00+1",
    "\ud800+1",
    "7" * 100_000,
    "\\boxed{" * 10_000,
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_with_an_error(answer):
    start = time.process_time()
    found = grade(f"</think> <answer>{answer}</answer>", "x+1", R1)
    assert time.process_time() - start < 1
    assert not found.answer_ok
    assert not found.lenient_ok
    assert found.error


def test_an_exception_in_the_comparison_becomes_the_error(monkeypatch):
    from logitmix.tasks.verify import compare

    def explode(*_args, **_kwargs):
        raise RecursionError("too deep")

    monkeypatch.setattr(compare, "read", explode)
    found = grade("</think> <answer>x+1</answer>", "1+x", R1)
    assert (found.answer_ok, found.error) == (False, "RecursionError: too deep")


def test_grading_gives_the_same_verdicts_in_another_thread():
    responses = [f"</think> <answer>{answer}</answer>" for answer in ("x+1", "x+2", "9^{9^{9^9}}")]
    here = [grade(response, "1+x", R1) for response in responses]
    there: list[Grade] = []
    thread = threading.Thread(target=lambda: there.extend(grade(response, "1+x", R1) for response in responses))
    thread.start()
    thread.join()
    assert there == here
    assert [found.answer_ok for found in there] == [True, False, False]


def test_importing_tasks_loads_no_heavy_module():
    heavy = {"torch", "transformers", "math_verify", "sympy", "datasets"}
    code = f"import sys, logitmix.tasks; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
