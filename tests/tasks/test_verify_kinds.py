r"""The grammar of answers: what it reads is compared by its kind; what it does not read equals only its own text."""

import random
import re
from fractions import Fraction

import pytest

from logitmix.tasks import BOXED, BOXED_LINE, R1, answers_match, grade
from logitmix.tasks.verify import evaluation, values
from logitmix.tasks.verify.evaluation import Evaluation
from logitmix.tasks.verify.explain import explain
from tests.helpers.hard_cases import DIFFERENT, EQUAL, cases
from tests.helpers.verify_kinds import OTHER, SAME


def both_ways(case):
    return {answers_match(*case), answers_match(*reversed(case))}


def test_two_ways_to_write_a_kind_of_value_match():
    assert [case for case in cases(SAME) if both_ways(case) != {True}] == []


def test_unread_markup_and_other_values_do_not_match():
    assert [case for case in cases(OTHER) if both_ways(case) != {False}] == []


def test_verdicts_are_symmetric():
    assert [case for case in cases(EQUAL) + cases(DIFFERENT) if len(both_ways(case)) > 1] == []


def test_a_decimal_comma_is_read_only_where_the_gold_has_a_point():
    assert answers_match("3,5", "3.5")
    assert not answers_match("3.5", "3,5")  # a list


GOLDS = ["42", "-7", "3.5", r"\frac{22}{31}", "(3,17)", "1,2", "x>3", "x^2+41x", r"\{4,9\}", "[2,9)"]
MARKUP_TEXT = r"""
    ^{\top} ^{\bmod ^\circ ^ _ \cap \cup \log \ln \sin \lim \sum \int \frac \sqrt \binom \overline{ \hat{ \vec{
    \mathrm{ \mathbb{R} \mathbb{Z} \mathbf{ \text{} \text{or} \text{and} \text{not} \boxed{ \left( \right)
    /\right \left| \| | & \\ \cdot \circ \% % \$ $ € \lor \land \neg \not \forall \to \implies \mid \prime
    \dagger \star \oplus \perp \mod \pmod{ \choose \phantom{ \hspace{1cm} \quad \displaystyle \limits \rm
    \color{red} \underbrace{ \overset \tag{1} \begin{array} \end{array} \begin{cases} \lfloor \rceil \langle # @
    ` " ' ? ! : ; , . -- ++ + - * / = < > \le \in \infty \pi \alpha \theta \pm \ne \approx \equiv \sim \Delta
    \nabla ( ) [ ] { } {} \{ 0 1 2 9 x e i <b> <sup> </sup> <br> &nbsp; \( \) \[ \] ** \, \; \! ~ \cm cm
    \unit{cm} \ldots ...
"""
MARKUP = MARKUP_TEXT.split()
# What changes nothing: blanks, styles, delimiters of formulas, closing marks, and units
NEUTRAL = re.compile(
    r"\\[,;!]|~|\\(?:quad|displaystyle|limits|rm)(?![a-z])|\\color\{red\}|\\text\{\}|\\?\$|\\[()\[\]]|`|€|\\%|%|\^\\circ|cm"
    r"|\\phantom\{?|\{\}"
)


def plainly(text):
    """An independent reading of an accepted answer: neutral marks removed, numbers as fractions, arithmetic done."""
    text = re.sub(r",?\\text\{(?:or|and)\}", ",", NEUTRAL.sub("", text))
    text = re.sub(r"(?:\\text\{|(?<=[0-9]))(?:[a-z]{3,})?\}?(?=[,)]|$)", "", text)  # a counted thing
    for found, plain in (
        (r"0-(?=7)|-\\binom(?=71)", "-"),
        (r"(?<=7)1$", ""),
        (r"1!", "1"),
        (r"2!", "2"),
        (r"3\+\.5", "3.5"),
    ):
        text = re.sub(found, plain, text)
    text = re.sub(r"^[ey]=|^\\theta\\approx|\\sqrt(?=1,)|1\\cdot(?=9)|^\+", "", text)
    text = re.sub(r"^(?:=|:|\\approx)|[.,;:]+$|\\\\$|\*\*", "", text)
    text = re.sub(r"(?<![\w.)}])\+(?=[0-9(\\])|(?<=[(,<>=])\+", "", text).replace("*", "").replace(r"\cdot", "")
    text = re.sub(r"\[([0-9]+)\]|(?<!\\)\{([0-9]+)\}(?![}{])|\(([0-9]+)\)", lambda m: m[1] or m[2] or m[3], text)
    numbers = re.sub(r"[0-9]*\.?[0-9]+\.?", lambda digits: f"<{Fraction(digits[0].rstrip('.'))}>", text)
    return re.sub(r"(?<![0-9>])<1>(?=x)|[{}]", "", numbers)


def test_a_gold_with_markup_put_in_is_accepted_only_if_it_still_says_the_same():
    chance, seen, accepted = random.Random(7), set(), []
    while len(seen) < 10_000:
        gold = chance.choice(GOLDS)
        text = gold
        for _ in range(chance.choice([1, 1, 2, 3])):
            place = chance.randint(0, len(text))
            text = text[:place] + chance.choice(MARKUP) + text[place:]
        if (text, gold) not in seen and answers_match(text, gold):
            accepted.append((text, gold))
        seen.add((text, gold))
    assert [case for case in accepted if plainly(case[0]) != plainly(case[1])] == []
    assert len(accepted) > 200


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (r"180^\circ", r"\pi"),
        ("1:2", r"\frac12"),
        ("0.333", r"\frac13"),
        ("3.14", r"\pi"),
        ("(2,1)", "(1,2)"),
        (r"\{1,2\}", "(2,1)"),
    ],
)
def test_the_lenient_verifier_widens_the_lenient_column_only(prediction, gold):
    response = f"so </think> <answer>{prediction}</answer>"
    strict, lenient = grade(response, gold, R1), grade(response, gold, R1, lenient=True)
    assert (strict.answer_ok, strict.lenient_ok) == (False, False)
    assert (lenient.answer_ok, lenient.lenient_ok) == (False, True)
    assert answers_match(prediction, gold, lenient=True)


@pytest.mark.parametrize(
    ("prediction", "gold"), [("0.33", "0.34"), ("0.4", r"\frac13"), (r"90^\circ", r"\pi"), ("x", "y")]
)
def test_the_lenient_verifier_refuses_other_values(prediction, gold):
    assert not answers_match(prediction, gold, lenient=True)


@pytest.mark.parametrize(
    ("template", "response"), [(BOXED, r"so $\boxed{\boxed{42}}$."), (BOXED_LINE, "6*7=42\n\\boxed{\\boxed{42}}")]
)
def test_a_box_in_a_box_is_one_box(template, response):
    assert grade(response, "42", template).answer_ok


@pytest.mark.parametrize("response", [r"\fbox{41} or \boxed{42}", r"\boxed{41}, \boxed{42}", r"\boxed{41 \boxed{42}}"])
def test_a_box_beside_a_box_is_not_in_the_format(response):
    assert not grade(response, "42", BOXED).format_ok


LONG = [r"\frac{v_0^2}{2g}", r"\frac{h}{3v_0}", r"\frac{g}{h+v_0^2}", r"\frac{v_0^2+2gh}{g^2+1}", r"\sqrt{v_0^2+2gh}"]


def test_a_verdict_counts_steps_and_not_seconds(monkeypatch):
    """The same verdict at any load, and whatever is in the caches."""
    case = "+".join(LONG), "+".join(reversed(LONG))
    steps = []
    for _ in range(3):
        assert answers_match(*case)
        steps.append(values._local.steps)
    values._cached_value.cache_clear()
    assert answers_match(*case)
    assert {*steps, values._local.steps} == {steps[0]}
    assert 0 < steps[0] < evaluation.MAX_STEPS / 10

    monkeypatch.setattr(values, "MAX_STEPS", steps[0] - 1)
    for _ in range(2):
        found = grade(f"</think> <answer>{case[0]}</answer>", case[1], R1)
        assert not found.answer_ok
        assert found.error == f"the comparison takes more than {steps[0] - 1:,} steps"


def test_a_long_sum_is_refused_by_its_steps():
    body = "+".join(["k"] * 60)
    found = grade(rf"</think> <answer>\sum_{{k=1}}^{{900}}({body})</answer>", "1", R1)
    assert (found.answer_ok, found.error) == (False, "the comparison takes more than 20,000 steps")


def test_a_limit_is_a_value_only_where_it_exists():
    assert answers_match(r"\lim_{x\to 0^+}\frac{|x|}{x}", "1")
    assert not answers_match(r"\lim_{x\to 0}\frac{|x|}{x}", "1")
    assert not answers_match(r"\lim_{x\to\infty}\cos x", "0")


def test_what_is_not_read_says_so():
    for answer, reason in ((r"42^{\top}", r"'\\top' is not expected"), ("42?", "'?' is left over"), ("(1", "open")):
        found = grade(f"</think> <answer>{answer}</answer>", "42", R1)
        assert not found.answer_ok
        assert reason.replace(r"\\", "\\") in found.error.replace(r"\\", "\\")


def test_a_function_that_is_not_given_is_no_factor():
    point = Evaluation(0, imaginary=False)
    x, two = ("sym", "x"), ("num", Fraction(2))
    values_of_f = {point.of(("apply", "f", argument)) for argument in (x, ("*", two, x), ("+", x, two))}
    assert len(values_of_f) == 3


def test_an_explanation_names_tokens_readings_rules_and_the_verdict():
    assert explain("0<x<2", "(0,2)").split("\n") == [
        "prediction: 0<x<2",
        "    tokens: 0 < x < 2",
        "    read as: relation 0 < x < 2",
        "gold: (0,2)",
        "    tokens: ( 0 , 2 )",
        "    read as: tuple ( 0 ; 2 )",
        "step: relation 0 < x < 2 ~ tuple ( 0 ; 2 ): equal (sets of real numbers are equal as sets)",
        "verdict: equal",
    ]
    assert explain("42?", "42").endswith("verdict: different ('?' is left over)")


def test_an_explanation_has_the_verdict_of_the_comparison():
    assert [case for case in cases(EQUAL) + cases(SAME) if not explain(*case).endswith("verdict: equal")] == []
