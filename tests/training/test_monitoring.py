"""What the trainer logs of a step, against the same numbers computed separately."""

import time

import pytest
import torch

from logitmix.training.monitoring.clock import Clock
from logitmix.training.scoring import MixtureScorer
from tests.helpers.grpo import generated, mixture, trainer_of
from tests.helpers.members import tiny_member
from tests.helpers.torchrun import run_two_processes


def member_logits(trainer, ids, mask, length):
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return [
        (member(ids, attention_mask=mask, position_ids=position_ids).logits[:, -length - 1 : -1].double())
        for member in trainer.model.members
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mixtures_diagnostics_are_means_over_the_completions_tokens(tmp_path, temperature):
    trainer = trainer_of(tmp_path, temperature=temperature)
    inputs, ids, mask = generated(trainer)
    length = inputs["completion_ids"].shape[1]
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs)
    found = {name: values[0] for name, values in trainer._metrics["train"].items()}

    tokens = inputs["completion_mask"].bool()
    assert not tokens.all(), "some completions are shorter"
    policy, anchor = member_logits(trainer, ids, mask, length)
    mixed = 0.6 * policy + 0.4 * anchor
    p = (mixed / temperature).softmax(-1)
    for name, z in (("policy", policy), ("anchor", anchor)):
        kl = (p * (p.log() - (z / temperature).log_softmax(-1))).sum(-1)
        assert found[f"mixture/kl_{name}"] == pytest.approx(kl[tokens].mean().item(), rel=1e-4)
    disagree = (policy.argmax(-1) != anchor.argmax(-1)) & tokens
    assert found["mixture/disagreement"] == pytest.approx((disagree.sum() / tokens.sum()).item())
    for name, z in (("policy", policy), ("anchor", anchor)):
        wins = (mixed.argmax(-1) == z.argmax(-1)) & disagree
        assert found[f"mixture/{name}_wins"] == pytest.approx((wins.sum() / disagree.sum()).item())

    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    ratio = (now - inputs["old_per_token_logps"]).exp()[tokens]
    assert found["ratio/min"] == pytest.approx(ratio.min().item(), rel=1e-5)
    assert found["ratio/max"] == pytest.approx(ratio.max().item(), rel=1e-5)
    assert found["ratio/min"] < 0.8 < 1.2 < found["ratio/max"]
    assert found["alpha"] == 0.4


@pytest.mark.parametrize("loss_head", ["fused", "reference"])
def test_diagnostics_are_computed_for_the_loss_and_not_for_the_old_policy(tmp_path, loss_head, monkeypatch):
    diagnosed = []
    score = MixtureScorer.score

    def recorded(*args, **kwargs):
        scores = score(*args, **kwargs)
        diagnosed.append(scores.diagnostics is not None)
        return scores

    monkeypatch.setattr(MixtureScorer, "score", recorded)
    options = {"steps_per_generation": 2, "per_device_train_batch_size": 4, "num_iterations": 2}
    trainer = trainer_of(tmp_path, loss_head=loss_head, **options)
    inputs = trainer._generate_and_score_completions([{"prompt": "ab="}] * 8)
    assert diagnosed
    assert not any(diagnosed)
    diagnosed.clear()
    trainer._compute_loss(trainer.model, inputs)
    assert diagnosed == [True]


def test_every_step_logs_what_it_did_and_cost(tmp_path):
    trainer = trainer_of(
        tmp_path, max_steps=3, steps_per_generation=2, gradient_accumulation_steps=2, num_iterations=2
    )
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    logs = trainer.state.log_history[:3]
    for log in logs:
        for name in ("rollouts", "rewards", "scoring", "update"):
            assert log[f"time/{name}"] >= 0
        assert log["tokens_per_second/update"] > 0
        assert log["ratio/min"] <= 1 <= log["ratio/max"]
        assert log["mixture/kl_policy"] > 0
        assert {"entropy", "learning_rate", "clip_ratio/region_mean", "alpha"} < set(log)
    assert [log["time/rollouts"] > 0 for log in logs] == [True, False, True], "an outer step has two updates"
    assert [("reward" in log) for log in logs] == [True, False, True]
    assert [("tokens_per_second/rollouts" in log) for log in logs] == [True, False, True]
    assert logs[0]["ratio/min"] == pytest.approx(1, abs=1e-4)
    assert logs[1]["ratio/min"] < 0.99, "the second pass over a generation is off policy"
    spent = sum(value for log in logs for name, value in log.items() if name.startswith("time/"))
    in_steps = sum(log["step_time"] for log in logs)
    assert in_steps * 0.8 < spent < wall


def test_extremes_are_those_of_all_steps_since_the_last_log(tmp_path):
    options = {"steps_per_generation": 1, "num_iterations": 3, "max_steps": 3, "learning_rate": 3e-2}
    each = trainer_of(tmp_path / "each", **options)
    each.train()
    seldom = trainer_of(tmp_path / "seldom", logging_steps=3, **options)
    seldom.train()
    logs = each.state.log_history[:3]
    (log,) = seldom.state.log_history[:1]
    assert log["ratio/min"] == min(log["ratio/min"] for log in logs)
    assert log["ratio/max"] == max(log["ratio/max"] for log in logs)
    assert len({log["ratio/max"] for log in logs}) == 3


def test_at_alpha_0_nothing_is_said_of_the_anchor_that_is_not_run(tmp_path):
    trainer = trainer_of(tmp_path, mixture(alpha=0.0), max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["alpha"] == 0
    assert not [name for name in log if name.startswith("mixture/")]


def test_a_model_without_an_anchor_logs_its_ratio_and_times(tmp_path):
    trainer = trainer_of(tmp_path, tiny_member(), max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert {"ratio/min", "ratio/max", "time/update", "tokens_per_second/rollouts"} < set(log)
    assert not [name for name in log if name.startswith("mixture/") or name == "alpha"]


def test_a_clock_counts_a_phase_that_failed_too():
    clock = Clock(torch.device("cpu"))

    def fail():
        with clock.timed("rollouts"):
            time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert clock.seconds["rollouts"] >= 0.01


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import pytest, torch
    from tests.helpers.grpo import generated, trainer_of
    from tests.training.test_monitoring import means_over_tokens
    trainer = trainer_of(Path(sys.argv[1]), ddp_backend="gloo")
    rank = trainer.accelerator.process_index
    inputs, ids, mask = generated(trainer)
    if rank == 1:
        inputs["completion_mask"][:, 3:] = 0  # fewer tokens: a mean over processes is no mean over tokens
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs)
    parts = [None, None]
    torch.distributed.all_gather_object(parts, means_over_tokens(trainer, inputs, ids, mask))
    assert parts[0] != parts[1]
    tokens = sum(count for count, _ in parts)
    for name in parts[0][1]:
        expected = sum(count * means[name] for count, means in parts) / tokens
        assert trainer._metrics["train"][name] == [pytest.approx(expected, rel=1e-4)], name
    print("agreed", flush=True)
"""


def means_over_tokens(trainer, inputs, ids, mask):
    """The number of tokens of a process, and the means over them."""
    tokens = inputs["completion_mask"].bool()
    policy, anchor = member_logits(trainer, ids, mask, inputs["completion_ids"].shape[1])
    log_mixture = (0.6 * policy + 0.4 * anchor).log_softmax(-1)
    kl = (log_mixture.exp() * (log_mixture - anchor.log_softmax(-1))).sum(-1)
    disagree = (policy.argmax(-1) != anchor.argmax(-1)).double()
    means = {"mixture/kl_anchor": kl, "mixture/disagreement": disagree}
    return tokens.sum().item(), {name: x[tokens].mean().item() for name, x in means.items()}


@pytest.mark.slow
def test_two_processes_log_means_over_the_tokens_of_both(tmp_path):
    assert run_two_processes(TWO_PROCESSES, tmp_path).count("agreed") == 2
