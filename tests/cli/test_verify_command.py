"""`logitmix verify PREDICTION GOLD`: the explanation, the status, and errors of its flags."""

import pytest

from logitmix.cli.__main__ import main
from logitmix.cli.options import data as data_options
from logitmix.tasks import Problem


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([r"-\frac12", "-0.5"], 0),
        (["2", "3"], 1),
        ([r"180^\circ", r"\pi"], 1),
        ([r"180^\circ", r"\pi", "--verifier", "lenient"], 0),
        (["--verifier=lenient", "1:2", "0.5"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_status_is_the_verdict(argv, status, capsys):
    assert main(["verify", *argv]) == status
    assert capsys.readouterr().out.endswith(f"verdict: {'different' if status else 'equal'}\n")


def test_the_help_says_what_lenient_means(capsys):
    assert main(["verify", "--help"]) == 0
    assert "radians for degrees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["1"], "verify compares two answers, a prediction and a gold, and got 1; quote each"),
        (["1", "2", "3"], "and got 3"),
        (["1", "2", "--verifier", "loose"], "--verifier is 'loose', but must be strict or lenient"),
        (["1", "2", "--verifier"], "--verifier is '', but must be strict or lenient"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_one_error_line(argv, message, capsys):
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_verifier_of_an_evaluation_reaches_its_task():
    grades = []
    for verifier in ("strict", "lenient"):
        data, task = data_options.TestProblemArguments(task="arithmetic", verifier=verifier).resolve_task(None)
        assert data.task == task.name == "arithmetic"
        grades.append(task.grade("half\n\\boxed{1:2}", Problem("1/2", "0.5")))
    assert [grade.answer_ok for grade in grades] == [False, False]
    assert [grade.lenient_ok for grade in grades] == [False, True]
