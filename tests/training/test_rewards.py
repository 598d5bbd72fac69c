"""The reward: 1 for a right answer in the format; the log counts what the verifier could not decide."""

import pytest

from logitmix.tasks import BOXED_LINE, Arithmetic, Grade, Problem
from logitmix.tasks.verify.evaluation import TOO_LONG
from logitmix.training.rewards import TaskReward


@pytest.fixture
def task():
    return Arithmetic()


def reward(task, completions, gold="3"):
    logged = {}
    rewards = TaskReward(task)(completions, ["1+2"] * len(completions), [gold] * len(completions), logged.__setitem__)
    return rewards, logged


def test_right_in_the_format_is_1_and_all_else_0(task):
    assert task.template is BOXED_LINE
    rewards, logged = reward(task, ["1+2=3\n\\boxed{3}", "1+2=4\n\\boxed{4}", "1+2=3\nso 3", ""])
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert logged == {
        "format_rate": 0.5,
        "answer_rate": 0.25,
        "lenient_rate": 0.5,
        "verifier/errors": 0.0,
        "verifier/timeouts": 0.0,
    }


def test_cases_without_a_verdict_are_0_counted_and_warned_of_above_one_per_cent(task, monkeypatch):
    errors = iter([f"{TOO_LONG} 20,000 steps", "'?' is left over", *[None] * 198])
    monkeypatch.setattr(
        Arithmetic, "grade", lambda *_: Grade(True, (error := next(errors)) is None, False, "3", error)
    )
    rewards, logged = reward(task, ["\n\\boxed{3}"] * 200)
    assert sum(rewards) == 198
    assert logged["verifier/errors"] == 2
    assert logged["verifier/timeouts"] == 1
    errors = iter([f"{TOO_LONG} 20,000 steps", "'?' is left over", *[None] * 197])
    with pytest.warns(UserWarning, match=r"no verdict on 2 of 199 completions, which count as wrong; the first: "):
        reward(task, ["\n\\boxed{3}"] * 199)


def test_completions_out_of_the_format_are_not_counted_as_without_a_verdict(task):
    assert task.grade(r"\boxed{3\foo}", Problem("1+2", "3")).error
    rewards, logged = reward(task, [r"\boxed{3\foo}"])
    assert rewards == [0.0]
    assert logged["verifier/errors"] == 0


def test_a_batch_in_which_every_column_has_not_one_row_is_refused(task):
    with pytest.raises(ValueError, match="zip"):
        TaskReward(task)(["a", "b"], ["1+2"], ["3"])
