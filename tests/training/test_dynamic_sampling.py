"""Dynamic sampling: the loss is eq. 6 over the questions that are kept.

Shape legend: Q questions, G rollouts each, N = Q·G.
"""

import math

import grpo_loop
import pytest
import torch

from logitmix.training.grpo import question_weights
from logitmix.training.rollouts.dynamic_sampling import QuestionStream, divisible_count, has_spread, replace_groups
from tests.helpers.grpo import EPS, PROMPTS, trainer_of
from tests.helpers.torchrun import run_two_processes

G = 4


def flat_on_short_prompts(prompts, completions, **kwargs):
    """A reward without spread on the prompt `x`, and different for each completion on the others."""
    return [
        0.5 if prompt == "x" else float(sum(map(ord, completion)) % 7)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def training_trainer(tmp_path, **kwargs):
    trainer = trainer_of(tmp_path, reward=kwargs.pop("reward", flat_on_short_prompts), **kwargs)
    trainer.model.train()
    torch.manual_seed(3)
    return trainer


def prompts_and_rewards(trainer, inputs):
    decode = trainer.processing_class.batch_decode
    prompts, completions = (
        decode([ids[mask.bool()] for ids, mask in zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"], strict=True)],
               skip_special_tokens=True)
        for name in ("prompt", "completion")
    )  # fmt: skip
    return prompts, torch.tensor(flat_on_short_prompts(prompts, completions))


def losses(trainer, inputs, kept):
    """The trainer's loss, and eq. 6 written out over the kept questions, slightly off policy."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    inputs["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(1))
    _, rewards = prompts_and_rewards(trainer, inputs)
    advantages_QG = grpo_loop.advantages(rewards.view(-1, G), eps=EPS)
    rows = torch.tensor([q * G + g for q in kept for g in range(G)])
    expected = grpo_loop.group_loss(
        now[rows], inputs["old_per_token_logps"][rows], advantages_QG[kept], inputs["completion_mask"][rows]
    )
    return trainer._compute_loss(trainer.model, inputs).item(), expected.item()


ROWS = [{"prompt": prompt} for prompt in PROMPTS for _ in range(G)]  # the last question is "x"


@pytest.mark.parametrize(("dynamic_sampling", "kept"), [("off", [0, 1, 2]), ("filter", [0, 1])])
def test_a_question_without_spread_leaves_the_loss_and_its_normaliser(tmp_path, dynamic_sampling, kept):
    trainer = training_trainer(tmp_path, dynamic_sampling=dynamic_sampling)
    inputs = trainer._generate_and_score_completions(ROWS)
    loss, expected = losses(trainer, inputs, kept)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert abs(loss) > 1e-3
    assert trainer._metrics["train"]["groups/without_spread"] == [pytest.approx(1 / 3)]


def test_refilled_questions_take_the_place_of_those_without_spread(tmp_path):
    trainer = training_trainer(tmp_path, dynamic_sampling="refill", max_refills=20, max_completion_length=12)
    inputs = trainer._generate_and_score_completions(ROWS[8:] + ROWS[:4] + ROWS[8:])
    prompts, rewards = prompts_and_rewards(trainer, inputs)
    assert "x" not in prompts
    assert prompts[4:8] == ["ab="] * 4, "the question with spread stays where it was"
    assert all(len(set(prompts[q * G : q * G + G])) == 1 for q in range(3))
    torch.testing.assert_close(inputs["rewards"][:, 0], rewards)
    assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()
    loss, expected = losses(trainer, inputs, [0, 1, 2])
    assert loss == pytest.approx(expected, abs=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["groups/without_spread"] == [pytest.approx(2 / 3)]
    assert metrics["groups/kept"] == [1.0]
    assert len(metrics["reward"]) == 1, "the log is of the step's own questions"
    assert trainer.refill_questions.drawn >= 2


def test_refills_go_on_from_their_saved_state(tmp_path):
    batches = []
    for name in ("one", "other"):
        trainer = training_trainer(tmp_path / name, dynamic_sampling="refill", prompts=[f"{i}+1=" for i in range(9)])
        if name == "other":
            trainer.refill_questions.load_state_dict({"drawn": 5})
        else:
            trainer.refill_questions.draw(5)
        assert trainer.refill_questions.state_dict() == {"drawn": 5}
        batches.append(trainer._generate_and_score_completions(ROWS[8:] * 3))
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name]), name


def test_at_its_limit_a_refill_says_so_and_the_rest_leaves_the_loss(tmp_path):
    asked = []

    def never(prompts, completions, **kwargs):
        asked.append(len(prompts))
        return [0.0] * len(prompts)

    trainer = training_trainer(tmp_path, reward=never, dynamic_sampling="refill", max_refills=2)
    with pytest.warns(UserWarning, match="after 2 refills 3 of 3 questions are still without reward spread"):
        inputs = trainer._generate_and_score_completions(ROWS)
    assert asked == [12, 12, 12]
    assert trainer._compute_loss(trainer.model, inputs).item() == 0
    assert trainer._metrics["train"]["groups/kept"] == [0.0]


def test_a_run_with_refills_trains(tmp_path):
    trainer = training_trainer(tmp_path, dynamic_sampling="refill", max_refills=20, steps_per_generation=2,
                               gradient_accumulation_steps=2, per_device_train_batch_size=6)  # fmt: skip
    trainer.train()
    assert all(log["groups/kept"] == 1 for log in trainer.state.log_history[:2])
    assert all("groups/without_spread" in log for log in trainer.state.log_history[:2])


def test_factors_over_the_questions_kept():
    lengths = torch.tensor([1, 3, 10, 30, 2, 2])
    per_token = torch.arange(48.0)
    factors = question_weights(lengths, 2, torch.tensor([True, False, True])).repeat_interleave(lengths)
    expected = (per_token[:4].mean() + per_token[44:].mean()) / 2
    torch.testing.assert_close((factors * per_token).sum() / 48, expected)
    assert question_weights(lengths, 2, torch.zeros(3, dtype=torch.bool)).tolist() == [0] * 6


def test_spread_is_of_the_weighted_sum_of_what_was_given():
    nan = math.nan
    rewards_NF = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, nan], [0.0, 1.0], [0.0, nan]])
    weights_F = torch.tensor([1.0, 0.5])
    assert has_spread(rewards_NF, weights_F, 2).tolist() == [False, True, True]
    assert has_spread(rewards_NF, torch.tensor([1.0, 0.0]), 2).tolist() == [True, False, False]


def test_the_stream_of_questions_takes_each_once_an_epoch_in_another_order():
    stream = QuestionStream(7, seed=1)
    epochs = [stream.draw(3) + stream.draw(4), stream.draw(7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert QuestionStream(7, seed=1).draw(14) == epochs[0] + epochs[1]
    assert QuestionStream(7, seed=2).draw(14) != epochs[0] + epochs[1]


@pytest.mark.parametrize(("questions", "num_generations", "processes"), [(1, 8, 4), (3, 4, 6), (1, 3, 8), (5, 2, 1)])
def test_the_processes_share_refills_evenly(questions, num_generations, processes):
    count = divisible_count(questions, num_generations, processes)
    assert count >= questions
    assert count * num_generations % processes == 0
    assert not any(n * num_generations % processes == 0 for n in range(questions, count))


def test_groups_of_another_width_are_padded_on_their_side():
    def batch(values, width):
        ids = torch.full((4, width), values)
        mask = torch.ones_like(ids)
        return {"prompt_ids": ids, "completion_ids": ids, "completion_mask": mask, "advantages": ids[:, 0]}

    mixed = replace_groups(batch(1, 2), batch(2, 3), places=[1], sources=[0], num_generations=2, pad_id=9)
    assert mixed["prompt_ids"].tolist() == [[9, 1, 1]] * 2 + [[2, 2, 2]] * 2
    assert mixed["completion_ids"].tolist() == [[1, 1, 9]] * 2 + [[2, 2, 2]] * 2
    assert mixed["completion_mask"].tolist() == [[1, 1, 0]] * 2 + [[1, 1, 1]] * 2
    assert mixed["advantages"].tolist() == [1, 1, 2, 2]
    narrower = replace_groups(batch(1, 2), batch(2, 1), places=[0], sources=[1], num_generations=2, pad_id=9)
    assert narrower["prompt_ids"].tolist() == [[9, 2]] * 2 + [[1, 1]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_sampling": "on"}, "it must be one of 'off', 'filter', 'refill'"),
        ({"dynamic_sampling": "filter", "loss_type": "grpo"}, "has no mean over questions"),
        ({"dynamic_sampling": "refill", "max_refills": 0}, "max_refills is 0"),
        ({"dynamic_sampling": "refill", "scale_rewards": "batch"}, "must not depend on the rest of their batch"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import torch
    from tests.training.test_dynamic_sampling import ROWS, losses, prompts_and_rewards, training_trainer
    trainer = training_trainer(Path(sys.argv[1]), dynamic_sampling="refill", max_refills=30,
                               per_device_train_batch_size=6, ddp_backend="gloo")
    rank = trainer.accelerator.process_index
    torch.manual_seed(3 + rank)
    rows = ROWS[8:] + ROWS[:4] + ROWS[8:]  # the middle group lies on both processes
    mine = trainer._generate_and_score_completions(rows[rank * 6 : rank * 6 + 6])
    parts = [None, None]
    torch.distributed.all_gather_object(parts, (mine, trainer.refill_questions.drawn))
    assert parts[0][1] == parts[1][1] >= 2
    whole = {name: torch.cat([p[0][name] for p in parts]) if value.dim() else value for name, value in mine.items()}
    prompts, rewards = prompts_and_rewards(trainer, whole)
    assert "x" not in prompts and all(len(set(prompts[i : i + 4])) == 1 for i in (0, 4, 8)), prompts
    torch.testing.assert_close(whole["rewards"][:, 0], rewards)
    assert whole["num_items_in_batch"] == whole["completion_mask"].sum()
    loss, expected = losses(trainer, whole, [0, 1, 2])
    assert abs(loss / 2 - expected) < 1e-6 and abs(expected) > 1e-3  # each process here took the whole batch
    print("agreed", flush=True)
"""


@pytest.mark.slow
def test_two_processes_refill_as_one(tmp_path):
    assert run_two_processes(TWO_PROCESSES, tmp_path).count("agreed") == 2
