"""What is format-correct, where an answer may stand, and what prompts and completions look like."""

import pytest

from logitmix.tasks import BOXED_LINE, R1
from logitmix.tasks.templates import last_boxed


def test_r1_prompt_asks_in_two_sentences_and_opens_the_think_block():
    header, user, assistant = R1.prompt("What is {x} if $x=1$?").split("\n")
    assert header.count(". ") == 1
    assert header.endswith(".")
    assert user == "User: What is {x} if $x=1$?"
    assert assistant == "Assistant: <think>"


def test_r1_keeps_its_stop_string_in_a_format_correct_response():
    completion = R1.completion("We add {1} and 1.\n", "2")
    assert completion == " We add {1} and 1. </think> <answer>2</answer>"
    assert completion.endswith(R1.stop)
    assert R1.extract(completion) == "2"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("a </think> <answer>2</answer>", "2"),
        ("</think> <answer> \\frac{1}{2}\n</answer> \n", "\\frac{1}{2}"),
        ("x < 3 and\nx > 1 </think> <answer>x<3</answer>", "x<3"),
    ],
)
def test_r1_accepts_one_think_block_then_one_answer_block(response, answer):
    assert R1.is_formatted(response)
    assert R1.extract(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "2",
        "a </think> <answer>2",
        "a <answer>2</answer>",
        "a </think><answer>2</answer>",
        "a </think>\n<answer>2</answer>",
        "a </think> <answer>2</answer> done",
        "a </think> <answer>  </answer>",
        "a </think> <answer>2</answer></answer>",
        "a </think> <answer>2</answer> </think> <answer>3</answer>",
        "a </think> <answer>2</answer><answer>3</answer>",
        "a <answer>2</answer> </think> <answer>3</answer>",
        "a <answer> </think> <answer>3</answer>",
        "a </think> b </think> <answer>3</answer>",
        "a </think> <answer><answer>3</answer>",
    ],
)
def test_r1_refuses_every_other_shape(response):
    assert not R1.is_formatted(response)
    assert R1.extract(response) is None


def test_r1_reads_a_long_hostile_response_in_linear_time():
    assert R1.extract("<answer>" * 20_000) is None
    assert R1.extract("</think> <answer>" * 20_000) is None
    assert R1.extract("a" * 300_000 + "</think> <answer>2</answer>") == "2"


def test_boxed_line_wants_the_box_alone_on_the_last_line():
    assert BOXED_LINE.prompt("1+2") == "1+2=?\n"
    assert BOXED_LINE.completion("1+2=3", "3") == "1+2=3\n\\boxed{3}"
    assert BOXED_LINE.extract("1+2=3\n\\boxed{3}") == "3"
    for response in (
        "\\boxed{3}",
        "1+2=\\boxed{3}",
        "1\n\\boxed{3}4",
        "1\n\\boxed{3}\n\\boxed{4}",
        "1\n\\boxed{}",
    ):
        assert not BOXED_LINE.is_formatted(response), response


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{ 2 }", "2"),
        ("thus \\boxed 9$.", "9"),
        ("unclosed \\boxed{1", None),
        ("ends in \\boxed", None),
        ("none", None),
    ],
)
def test_last_boxed_matches_braces(text, boxed):
    assert last_boxed(text) == boxed
