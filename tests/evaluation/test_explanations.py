"""What the tables say in words about low rates, and the intervals of every measure of a sweep's point."""

import pytest

from logitmix.evaluation.complement import complement
from logitmix.evaluation.explanations import explain
from logitmix.evaluation.statistics import mean_estimate, wilson_interval
from logitmix.evaluation.sweep import sweep_rates
from tests.helpers.responses import make_response


def group(name, alpha=0.0, n=100, format=0, answer=0, lenient=0, cut=0, limit=96):
    """n responses of which the first `format` are in the format, and so on."""
    return [
        make_response(
            name=name, alpha=alpha, problem=i, prompt=f"question {i}", format_ok=i < format, answer_ok=i < answer,
            lenient_ok=i < lenient, truncated=i < cut, length=limit if i < cut else 20,
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"lenient": 43, "cut": 82},
            [
                "x: 0 % in the format, 43 % right without it: the template is not followed.",
                "x: 82 % were cut at 96 tokens: raise --max_new_tokens.",
            ],
        ),
        ({"format": 3, "answer": 2, "lenient": 40}, ["x: 3 % in the format, 37 % right without it: the"]),
        (
            {"format": 100, "lenient": 43},
            ["x: 100 % in the format, 0 % right in it and 43 % anywhere in the text: the answer is not where"],
        ),
        ({"format": 60}, ["x: 60 % in the format, and no answer is right."]),
        ({}, ["x: no response is in the format, and none is right without it."]),
        ({"format": 100, "answer": 80, "lenient": 82, "cut": 9}, []),
        ({"format": 70, "answer": 60, "lenient": 60, "cut": 30}, ["x: 30 % were cut at 96 tokens: raise"]),
    ],
)  # fmt: skip
def test_a_low_rate_is_explained_in_one_line(fields, expected):
    lines = explain(group("x", **fields))
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


def test_alphas_of_a_mix_with_one_cause_share_a_line():
    rows = group("policy", 0.0, lenient=43) + group("anchor", 1.0, format=100, answer=7, lenient=7)
    rows += group("logit", 0.7, format=90, answer=50, lenient=50)
    rows += group("logit", 0.5, lenient=30) + group("logit", 0.3, lenient=35)
    assert explain(rows) == [
        "policy: 0 % in the format, 43 % right without it: the template is not followed.",
        "logit at 0.3, 0.5: 0 % in the format, 30 to 35 % right without it: the template is not followed.",
    ]


def test_several_samples_of_a_problem_and_a_model_without_alpha():
    rows = group("model", None, n=10, lenient=5) * 3
    assert explain(rows) == ["model: 0 % in the format, 50 % right without it: the template is not followed."]


def test_every_measure_of_a_point_has_its_interval():
    rows = group("policy", 0.0, lenient=43, cut=82) + group("anchor", 1.0, format=100, answer=7, lenient=7)
    rows += group("prob", 0.5, format=85, answer=8, lenient=20, cut=10)
    point = {row["alpha"]: row for row in sweep_rates(rows)}[0.5]
    for key, count in (("format", 85), ("answer", 8), ("lenient", 20), ("truncated", 10)):
        assert (point[f"{key}_low"], point[f"{key}_high"]) == wilson_interval(count, 100)
    assert point["mean_length"] == pytest.approx(27.6)
    assert point["mean_length_low"] < 27 < 28 < point["mean_length_high"]


def test_the_interval_of_a_mean_is_the_normal_one():
    found = mean_estimate([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * (5 / 3) ** 0.5 / 2
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-6)
    assert mean_estimate([3]).high == 3
    with pytest.raises(ValueError, match="no numbers"):
        mean_estimate([])


def test_complement_counts_right_answers_anywhere_in_the_text_and_compares_cuts_and_lengths():
    """A base that is right without the format, and an SFT model in the format: one is never right in the format."""
    base, sft = group("base", lenient=43, cut=80), group("sft", format=100, answer=7, lenient=7)
    c = complement(base, sft)
    assert (c.both, c.only_a, c.only_b, c.neither) == (0, 0, 7, 93)
    lenient = c.lenient_cross
    assert (lenient.both, lenient.only_a, lenient.only_b, lenient.neither) == (7, 36, 0, 57)
    assert (lenient.either.value, lenient.disagreement.value) == (0.43, 0.36)
    assert c.truncated.b_minus_a.value == -0.8
    assert c.truncated.p_value < 0.001
    assert c.mean_length.b_minus_a.value == pytest.approx(-0.8 * 76)
    assert c.mean_length.b_minus_a.low < c.mean_length.b_minus_a.value < c.mean_length.b_minus_a.high
