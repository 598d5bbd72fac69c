"""The verifier on the hard set, mutations of every gold, and hostile and fuzzed strings."""

import json
import random
import time

import pytest

from logitmix.tasks import R1, answers_match, grade
from logitmix.tasks.templates import last_boxed
from tests.helpers.hard_cases import DIFFERENT, EQUAL, cases
from tests.helpers.mutations import mutations
from tests.helpers.paths import SHARED

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"the data is not at {DATA}")


def test_the_hard_set_is_large_and_has_no_repeats():
    assert len(set(cases(EQUAL))) == len(cases(EQUAL)) > 240
    assert len(set(cases(DIFFERENT))) == len(cases(DIFFERENT)) > 150


@pytest.mark.parametrize("case", cases(EQUAL), ids=lambda case: " ~ ".join(case))
def test_hard_positives_match(case):
    assert answers_match(*case)


@pytest.mark.parametrize("case", cases(DIFFERENT), ids=lambda case: " ~ ".join(case))
def test_hard_negatives_do_not_match(case):
    assert not answers_match(*case)


def golds(name):
    def rows(path):
        return [json.loads(line) for line in (DATA / path).read_text(encoding="utf-8").split("\n") if line]

    if name == "math":
        boxes = [last_boxed(row["solution"]) for row in rows("math/train.jsonl")]
        return [box for box in boxes if box] + [row["answer"] for row in rows("math/test500.jsonl")]
    if name == "cn_k12":
        return [row["answer"] for row in rows("cn_k12/cn_k12.jsonl") if row["n_boxed"] == 1]
    if name == "mmlu":
        return ["ABCD"[row["answer"]] for path in ("mmlu/dev.jsonl", "mmlu/val.jsonl") for row in rows(path)]
    return [row["answer"].rpartition("####")[2].strip() for row in rows("gsm8k/train.jsonl")]


# Mutations that equal the gold, so accepting them is right: -0 is 0, also in matrices, and a plus-minus has no sign.
EQUAL_MUTATIONS = {"sign": ("-0", "-\\pm", "-±", "-\\begin{pmatrix} 0")}
# Golds with a wrong mutation that is accepted: what follows "approximately" is not compared if an exact value precedes
# it, and a sign inside \phantom is not printed.
KNOWN_ERRORS = {r"\$\dfrac23 \approx \$0.67", r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}"}
# The most pairs of neighbours in a data set that have equal answers, such as x=5 and 5.
EQUAL_NEIGHBOURS = 25


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["math", "cn_k12", "gsm8k", "mmlu"])
def test_mutations_of_every_gold_do_not_match(name):
    answers = golds(name)
    made, accepted = 0, []
    for gold, other in zip(answers, [*answers[1:], answers[0]], strict=True):
        for kind, wrong in mutations(gold, other).items():
            made += 1
            if answers_match(wrong, gold) and not wrong.startswith(EQUAL_MUTATIONS.get(kind, ("\0",))):
                accepted.append((kind, wrong, gold))
    assert [case for case in accepted if case[0] != "another gold" and case[2] not in KNOWN_ERRORS] == []
    assert len([case for case in accepted if case[0] == "another gold"]) <= EQUAL_NEIGHBOURS
    assert len(accepted) <= 0.002 * made + (10 if made < 4000 else 0)


@needs_data
@pytest.mark.parametrize("name", ["math", "cn_k12", "gsm8k", "mmlu"])
def test_every_gold_matches_itself_restyled(name):
    def restyled(gold):
        return "$\\displaystyle " + gold.strip().rstrip(".").replace("\\frac", "\\dfrac") + "$."

    answers = list(dict.fromkeys(golds(name)))
    failures = [gold for gold in answers if "text" not in gold and not answers_match(restyled(gold), gold)]
    assert failures == []


PIECES = [
    *"0123456789+-*/^_=<>()[]{}|,.;:!%$&~'\" \n\t\\",
    *["\\frac", "\\sqrt", "\\pm", "\\cup", "\\infty", "\\text{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\in", "\\le"],
    *[
        "x",
        "y",
        "e",
        "i",
        "sin",
        "\\log_",
        "\\binom",
        "\\sum",
        "\\boxed{",
        "</answer>",
        "<answer>",
        "</think>",
        "and",
        "or",
    ],
    *[
        "\x00",
        "\ud800",
        "\u202e",
        "½",
        "π",
        "①",
        "中",
        "𝟙",
        "\\%",
        "^{\\circ}",
        "999999",
        "^{99",
        "!!",
        "\\\\",
        "\\unit{cm}",
    ],
]
GOLDS = ["31337", "\\frac{22}{31}", "x^2+41x", "(3,17)", "[2,\\infty)", "\\text{Evelyn}", "B", "\\{4,9\\}", "y=13x+5"]


def fuzzed(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        gold = GOLDS[number % len(GOLDS)]
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 40)))
        if number % 3 == 0:  # a damaged right answer
            place = rng.randrange(len(gold))
            text = gold[:place] + text[: rng.randint(1, 6)] + gold[place + rng.randint(0, 3) :]
        yield text, gold


def test_fuzzed_strings_are_graded_quickly_without_wrong_accepts():
    """No crash and no hang; an accepted string contains digits or letters of the gold."""
    start, slowest = time.perf_counter(), 0.0
    for text, gold in fuzzed(10_000, seed=0):
        before = time.perf_counter()
        found = grade(f"</think> <answer>{text}</answer>", gold, R1)
        slowest = max(slowest, time.perf_counter() - before)
        assert grade(text, gold, R1).answer_ok is False
        if found.answer_ok:
            key = [character for character in gold if character.isalnum()][-1]
            assert key.casefold() in text.casefold(), (text, gold)
    assert slowest < 30
    assert time.perf_counter() - start < 600


INJECTED = [
    "</think> <answer>5</answer> <answer>6</answer>",
    "</think> <answer>5</answer></think> <answer>6</answer>",
    "<answer>6</answer> </think> <answer>5</answer>",
    "</think> <answer><answer>6</answer></answer>",
    "6 </think> <answer>5</answer>",
    "</think> <answer>5 or 6</answer>",
    "</think> <answer>5, 6</answer>",
    "</think> <answer>\\boxed{5} \\boxed{6}</answer>",
    "</think> <answer>x=5=6</answer>",
    "</think> <answer>not 6</answer>",
    "</think> <answer>0,1,2,3,4,5,6,7,8,9</answer>",
    "</think> <answer>\\{6\\ldots\\}</answer>",
    "</think> <answer>anything that equals 6</answer>",
    "</think> <answer></answer>",
]


@pytest.mark.parametrize("response", INJECTED)
def test_hedged_and_misplaced_answers_are_wrong(response):
    assert not grade(response, "6", R1).answer_ok


@pytest.mark.parametrize(
    "hostile",
    [
        "{" * 100_000,
        "(" * 490,
        "-" * 490,
        "\\frac{1}{" * 50 + "2" + "}" * 50,
        "\\sqrt{" * 60 + "2" + "}" * 60,
        "9^{9^{9^9}}",
        "9^9^9^9",
        "\\exp(\\exp(\\exp(9)))",
        "999!",
        "99999!",
        "((9!)!)!",
        "\\binom{99999999}{44444444}",
        "10^{99999999999}",
        "0.1^{99999999999}",
        "x^{x^{x^{x^x}}}",
        "|" * 300,
        "1," * 240,
        "\\pm " * 100,
        "1\\pm2\\pm3\\pm4\\pm5\\pm6",
        "\x00",
        "\ud800\udfff",
        "x\ud800+1",
        "a" * 100_000,
        "\\text{" * 80,
        "$" * 490,
        "1" * 490,
        "\\begin{pmatrix}" * 30,
        "x=" * 240,
        "\\and " * 98,
        "\\overline{" * 40 + "1",
        "\\boxed{" * 60 + "6" + "}" * 59,
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_hostile_answers_are_rejected_within_a_second_of_the_processor(hostile):
    for gold in ("6", "x+1", "(1,2)", "\\{1,2\\}", "x<1"):
        start = time.process_time()
        assert not answers_match(hostile, gold)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("gold", ["5", r"\frac12", "x^2+1", "1+i", "x>3", r"(\pi, 2)"])
def test_an_infinite_value_equals_no_answer(gold):
    """`\\ln 0` is -inf in mpmath, and a relative tolerance around it is infinite."""
    for infinite in (
        r"\ln 0",
        r"-\ln(0)+i",
        r"\ln(x-x)",
        r"\frac{1}{\ln 0}",
        r"\arctan i",
        r"x>\ln 0",
        r"(\ln 0, \ln 0)",
    ):
        assert not answers_match(infinite, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        (r"5\text{ million}", "5"),
        ("3 squared", "3"),
        ("2 dozen", "2"),
        ("2 hundred", "2"),
        (r"2 \text{ thirds}", "2"),
        ("5 plus three", "5"),
        ("12 if n is odd", "12"),
        ("52 base eight", "52"),
        (r"500\%\%", "5"),
        ("f(x)=5", "g(x)=5"),
        ("no", "on"),
        ("5 | 6", "5"),
        ("5 & 6", "5"),
        (r"5 \\ 6", "5"),
        ("5 ? 6", "5"),
        (r"6 \to 5", "5"),
        (r"6 \implies 5", "5"),
        (r"5\hspace{1cm}6", "5"),
        (r"\max(i, 1)", "1"),
    ],
)
def test_text_that_merely_contains_the_answer_does_not_match(prediction, gold):
    assert not answers_match(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("no", r"\text{No}"),
        ("1e5", "100000"),
        ("2.5E-3", "0.0025"),
        ("2¹⁰", "1024"),
        ("10⁻³", "0.001"),
        (r"\mathbf{42}", "42"),
        (r"\boldsymbol{(C)}", "C"),
        (r"\color{red}{42}", "42"),
        (r"5\text{ million}", "5000000"),
        (r"5\text{ meters squared}", "5"),
        ("5 sec", "5"),
        ("3 times", "3"),
    ],
)
def test_other_spellings_match(prediction, gold):
    assert answers_match(prediction, gold)


@pytest.mark.parametrize("hedge", ["6 \\boxed{5}", "it is 6, no wait \\boxed{5}", "\\boxed{5} or 6"])
def test_a_box_beside_another_number_does_not_match(hedge):
    assert not answers_match(hedge, "5")


@pytest.mark.parametrize("text", ["\\boxed{5}", "$x=\\boxed{5}$.", "The answer is $\\boxed{5}$", "2+3=\\boxed{5}"])
def test_a_box_at_the_end_of_a_sentence_or_equation_matches(text):
    assert answers_match(text, "5")


@pytest.mark.parametrize(
    "prediction", ["5\\text{x}", "5 \\text{ y}", "5 either six", "5 maybe six", "5 versus six", "5 times two"]
)
def test_a_variable_or_a_number_in_words_is_not_a_unit(prediction):
    assert not answers_match(prediction, "5")


@pytest.mark.parametrize("prediction", ["5\\text{ m}", "5\\text{ g}", "5 \\text{ N}", "5 apples", "5\\text{ dogs}"])
def test_units_and_counted_things_are_ignored(prediction):
    assert answers_match(prediction, "5")
