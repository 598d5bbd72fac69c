"""Templates: prompts, completions, format-correct responses, and template files."""

from dataclasses import replace

import pytest

from logitmix.tasks import (
    ANSWER_IS,
    BOXED,
    BOXED_LINE,
    R1,
    HendrycksMath,
    Problem,
    Template,
    grade,
    load_task,
    load_template,
)
from logitmix.tasks.templates import TEMPLATES, last_boxed, unbox


def test_r1_prompt_has_two_sentences_and_opens_the_think_block():
    header, user, assistant = R1.prompt("What is {x} if $x=1$?").split("\n")
    assert header.count(". ") == 1
    assert header.endswith(".")
    assert user == "User: What is {x} if $x=1$?"
    assert assistant == "Assistant: <think>"


def test_r1_completions_end_in_the_stop_string_and_are_format_correct():
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
def test_r1_rejects_every_other_shape(response):
    assert not R1.is_formatted(response)
    assert R1.extract(response) is None


def test_r1_parses_a_long_hostile_response_in_linear_time():
    assert R1.extract("<answer>" * 20_000) is None
    assert R1.extract("</think> <answer>" * 20_000) is None
    assert R1.extract("a" * 300_000 + "</think> <answer>2</answer>") == "2"


def test_boxed_line_requires_only_the_box_on_the_last_line():
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


def test_boxed_prompts_a_chat_for_steps_and_a_box():
    (message,) = BOXED.prompt("What is {x} if $x=1$?")
    assert message["role"] == "user"
    assert message["content"].startswith("What is {x} if $x=1$?\n")
    assert "reason step by step, and put your final answer within \\boxed{}." in message["content"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{4}", "4"),
        ("So \\[ \\boxed{ \\frac{1}{2} } \\] apples.", "\\frac{1}{2}"),
        (
            "$\\boxed{\\left( \\frac{\\sqrt{2}}{2}, \\{1, 2\\} \\right)}$",
            "\\left( \\frac{\\sqrt{2}}{2}, \\{1, 2\\} \\right)",
        ),
        ("$\\boxed{\\left\\{ x \\right.}$", "\\left\\{ x \\right."),
        ("Then {a} and\n\\boxed{\\text{(B)}}\nis right. }{", "\\text{(B)}"),
        ("", None),
        ("4", None),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("\\boxed 4", None),
        ("\\boxed{4", None),
        ("\\boxed{\\frac{1}{2}", None),
        ("\\boxed{4}, or rather \\boxed{5}", None),
        ("\\boxed{4} \\boxed", None),
        ("\\boxed{\\boxed{4}}", "\\boxed{4}"),
        ("\\boxed{5\\boxed{4}}", None),
    ],
)
def test_boxed_requires_exactly_one_box_with_matching_braces(response, answer):
    assert BOXED.extract(response) == answer


def test_boxed_parses_a_long_hostile_response_in_linear_time():
    for hostile in ("\\boxed{" * 20_000, "\\boxed{" + "{" * 100_000, "\\boxed{" + "{a}" * 50_000, "\\" * 100_001):
        assert BOXED.extract(hostile) is None
    assert BOXED.extract("a{" * 100_000 + "\\boxed{2}") == "2"


def test_completions_open_the_boxes_of_a_solution_if_the_answer_is_boxed():
    completion = BOXED.completion("So $\\boxed{\\frac{1}{2}}$, \\boxed 3 or 4.", "3")
    assert completion == "So $\\frac{1}{2}$, 3 or 4.\n\nThe final answer is $\\boxed{3}$."
    assert BOXED.extract(completion) == "3"
    assert R1.completion("It is \\boxed{3}.", "3") == " It is \\boxed{3}. </think> <answer>3</answer>"
    assert unbox("\\boxed{open") == "{open"


MINE = {
    "name": "mine",
    "prompt_format": "Q: {question}\nA:",
    "completion_format": " {solution} ANSWER: {answer}\n",
    "pattern": r".*ANSWER: (?P<answer>.*)\n",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_format": "Q:"}, "has no {question} in its prompt_format"),
        ({"completion_format": "ANSWER: {answer}\n"}, "has no {solution} in its completion_format"),
        ({"completion_format": "{solution} {answer} {other}"}, "is not a format text"),
        ({"prompt_format": "{question} in \\boxed{}"}, "is not a format text .* brace twice"),
        ({"pattern": "("}, "the pattern of the template 'mine' is not a regular expression"),
        ({"pattern": ".*"}, "has no group"),
        ({"pattern": "(?P<answer>[a-z]*)"}, "does not find the answer '1' in its own completion"),
        ({"stop": ("ANSWER",)}, "stops at 'ANSWER', which its own response .* contains before its end"),
        ({"stop": ("",)}, "empty stop string"),
    ],
)
def test_an_inconsistent_template_is_rejected(change, message):
    assert Template(**MINE, stop=("\n",)).stop == ("\n",), "a completion may end in the stop string"
    with pytest.raises(ValueError, match=message):
        Template(**(MINE | change))


def test_a_template_loads_from_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'name: mine\nprompt_format: |-\n  Q: {question}\n  A:\ncompletion_format: " {solution} ANSWER: {answer}\\n"\n'
        "pattern: '.*ANSWER: (?P<answer>.*)\\n'\nstop: \"\\n\"\nchat: true\n"
    )
    assert load_template(str(path)) == Template(**MINE, stop=("\n",), chat=True)
    assert load_template("boxed") is BOXED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no fields; it needs name, prompt_format, completion_format, pattern, stop, chat"),
        ("just text", "holds no fields"),
        (
            "name: mine\nprompt: a",
            r"no template field 'prompt'; did you mean 'prompt_format'\? Correct it in .*mine\.yaml",
        ),
        ("name: 3", "name is 3 .* but must be str"),
        ("chat: 1", "chat is 1 .* but must be bool"),
        ("name: mine", "has no field 'prompt_format'; add it"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_template_file_is_rejected(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_template(str(path))


def test_an_unknown_template_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="no template 'box'; did you mean 'boxed'"):
        load_template("box")
    with pytest.raises(ValueError, match=r"the template file no\.yml does not exist; the templates are r1, boxed"):
        load_template("no.yml")


@pytest.mark.parametrize("rest", [".", ")\n", "", " and more </answer>"])
def test_text_after_the_stop_string_is_not_graded(rest):
    """Qwen has a token `>.`, so a response may end one character after the stop string."""
    task = HendrycksMath.__new__(HendrycksMath)
    task.template = R1
    graded = task.grade(f"2 and 2 </think> <answer>4</answer>{rest}", Problem("2+2?", "4"))
    assert graded.format_ok
    assert graded.answer_ok


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_answer_alone_is_a_right_response_without_a_solution(template):
    text = template.answer_alone("12")
    assert grade(text, "12", template).answer_ok
    task = load_task("word_problems", template=template)
    for row, problem in zip(task.demonstrations(5, "answer"), task.problems("train", 5), strict=True):
        assert task.grade(row["completion"], problem).answer_ok
        assert problem.solution not in str(row["completion"])


def test_an_answer_is_demonstrated_where_the_data_have_no_solution(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"question": "What is 2+3?", "answer": "5"}\n')
    task = load_task("jsonl", data, template="answer_is")
    with pytest.raises(ValueError, match="or demonstrate answers"):
        task.demonstrations()
    assert task.demonstrations(demonstrate="answer")[0]["completion"][0]["content"] == "The answer is 5."


def test_a_template_that_needs_a_solution_demonstrates_no_answer_alone():
    template = replace(ANSWER_IS, pattern=r"\w.*\nThe answer is (?P<answer>.*)\.")
    with pytest.raises(ValueError, match="demonstrate solutions"):
        template.answer_alone("12")
