"""Warnings about runs that do not learn: when each is given, once, and when it is not."""

import warnings

import pytest

from logitmix.training.monitoring.advice import Advice
from tests.helpers.grpo import trainer_of


def advice(logs, every=1, first_step=0) -> list[str]:
    """The warnings over a run with these logs, `every` steps apart."""
    watching, found = Advice(), []
    for i, log in enumerate(logs, start=1):
        found += watching.observe(first_step + i * every, log, first_step)
    return found


@pytest.mark.parametrize(("every", "logs"), [(1, 10), (10, 1), (4, 3)])
def test_groups_without_spread_for_ten_steps_are_named_once(every, logs):
    stuck = {"groups/without_spread": 0.75, "reward": 0.02}
    assert advice([stuck] * (logs - 1), every) == []
    (text,) = advice([stuck] * (3 * logs), every)
    assert f"for {logs * every} steps, 75 % in the last" in text
    assert "mean reward 0.02" in text


def test_a_step_with_spread_starts_the_count_again():
    stuck, learning = {"groups/without_spread": 0.8}, {"groups/without_spread": 0.5}
    assert advice([*[stuck] * 9, learning, *[stuck] * 9]) == []


def test_a_format_rate_near_zero_at_the_start_is_named_with_what_to_try():
    low = {"format_rate": 0.02, "alpha": 0.5}
    assert advice([low] * 2) == []
    (text,) = advice([low] * 6)
    assert "2.0 % of the rollouts are in the required format after 3 steps" in text
    assert "a larger alpha, scheme='prob', another template" in text
    (text,) = advice([{"format_rate": 0.0}] * 3)
    assert "alpha" not in text, "a model alone has none"
    assert advice([{"format_rate": 0.3}, *[low] * 6]) == [], "it was not near 0 at the start"
    assert advice([low] * 6, first_step=20) == [], "a resumed run"
    assert advice([{"reward": 1.0}] * 6) == [], "a reward that does not log it"


def test_logs_of_updates_that_sample_nothing_change_nothing():
    """As in the paper's recipes: 8 updates use the rollouts of an outer step, and each is logged."""
    sampled = {"groups/without_spread": 1.0, "format_rate": 0.0, "reward": 0.0}
    texts = advice([log for _ in range(3) for log in (sampled, *[{"loss": 0.1}] * 7)])
    assert ["spread" in text for text in texts] == [False, True]
    assert "in the required format after 9 steps" in texts[0]


def test_the_kl_to_several_anchors_counts():
    noise = (0.02, -0.02, 0.01, -0.01)
    logs = [
        {"reward": 0.3 + noise[i % 4], "mixture/kl_anchor_0": 0.1, "mixture/kl_anchor_1": 0.05 + i / 20}
        for i in range(20)
    ]
    (text,) = advice(logs, every=2)
    assert "the reward has not risen since step" in text


def curve(reward, kl, n=20):
    return [{"reward": reward(i / n), "mixture/kl_anchor": kl(i / n), "kl": 9.0} for i in range(n)]


def test_a_flat_reward_with_a_growing_kl_is_named():
    noise = [0.02, -0.02, 0.01, -0.01]
    flat = curve(lambda x: 0.3 + noise[int(20 * x) % 4], lambda x: 0.05 + 0.5 * x)
    (text,) = advice(flat, every=2)
    assert "the reward has not risen since step" in text
    assert "the policy moves without learning" in text
    assert advice(flat[:11], every=2) == [], "too few logs"
    assert advice(flat) == [], "too few steps"


@pytest.mark.parametrize(
    ("reward", "kl"),
    [
        (lambda x: 0.3 + 0.4 * x, lambda x: 0.05 + 0.5 * x),  # it learns
        (lambda x: 0.3, lambda x: 0.3 + 0.01 * x),  # nothing moves
        (lambda x: 0.3, lambda x: 0.001 + 0.01 * x),  # hardly anything moves
        (lambda x: 0.3, lambda x: float("nan")),
    ],
)
def test_a_run_that_learns_or_stays_is_not_named(reward, kl):
    assert advice(curve(reward, kl), every=2) == []


def test_the_trainer_warns_during_training(tmp_path):
    trainer = trainer_of(tmp_path, reward=lambda completions, **_: [0.0] * len(completions), max_steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(warning.message) for warning in caught if "no spread of rewards" in str(warning.message)]
    assert len(texts) == 1
    assert "for 10 steps, 100 % in the last" in texts[0]
