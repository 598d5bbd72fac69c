"""What TRL's GRPO trainer does with one model, done with a mixture: rewards, data sets, evaluation and rollouts."""

import asyncio
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.grpo import PROMPTS, count_vowels, mixture
from tests.helpers.members import VOCAB_SIZE, character_tokenizer

ROWS = [{"prompt": prompt, "wanted": "ae"[i % 2]} for i, prompt in enumerate(PROMPTS * 4)]


def trainer_of(tmp_path, rewards=count_vowels, dataset=None, model=None, **kwargs):
    options = {name: kwargs.pop(name) for name in ("eval_dataset", "rollout_func", "callbacks") if name in kwargs}
    options |= {k: kwargs.pop(k) for k in ("reward_processing_classes",) if k in kwargs}
    arguments = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    return LogitMixGRPOTrainer(
        mixture() if model is None else model,
        reward_funcs=rewards,
        args=LogitMixGRPOConfig(str(tmp_path), **arguments | kwargs),
        train_dataset=Dataset.from_list(ROWS) if dataset is None else dataset,
        processing_class=character_tokenizer(),
        **options,
    )


def trained(trainer):
    """The policy's weights and the first step's log, after training from a fixed seed."""
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("policy.") for name in moved)
    return {name: p.detach() for name, p in after.items()}, trainer.state.log_history[0]


def test_an_asynchronous_reward_trains_as_the_same_reward_does(tmp_path):
    async def later(completions, **kwargs):
        await asyncio.sleep(0.01)
        return count_vowels(completions)

    (weights, log), (expected, plain) = (trained(trainer_of(tmp_path, reward)) for reward in (later, count_vowels))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert log["rewards/later/mean"] == plain["rewards/count_vowels/mean"]


def test_a_stream_of_questions_trains_as_the_data_set_does_in_order(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    (weights, _), (expected, _) = (
        trained(trainer_of(tmp_path, dataset=data, shuffle_dataset=False)) for data in (stream, None)
    )
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_rewards_are_weighted_and_a_missing_one_is_left_out(tmp_path):
    """The second reward function has no opinion on some rows; columns of the data set reach both."""

    def wants(completions, wanted, **kwargs):
        return [float(w in text) for text, w in zip(completions, wanted, strict=True)]

    def sometimes(completions, wanted, **kwargs):
        return [None if w == "a" else float(len(text)) for text, w in zip(completions, wanted, strict=True)]

    trainer = trainer_of(tmp_path, [wants, sometimes], reward_weights=[1.0, 0.5], shuffle_dataset=False)
    rewards = []
    compute = trainer.compute_rewards
    trainer.compute_rewards = lambda *args: rewards.append(compute(*args)) or rewards[-1]
    trainer.train()
    rewards_NF = rewards[0]
    assert torch.isnan(rewards_NF[:, 1]).sum() == 4
    expected = (rewards_NF[:, 0] + 0.5 * rewards_NF[:, 1].nan_to_num()).mean().item()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(expected)


def test_a_reward_that_is_missing_from_every_function_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, [lambda completions, **_: [None] * len(completions)])
    with pytest.raises(FloatingPointError, match="reward"):
        trainer.train()


def test_a_reward_model_scores_prompt_and_completion(tmp_path):
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    judge = Qwen2ForSequenceClassification(config).eval()
    trainer = trainer_of(tmp_path, judge, reward_processing_classes=character_tokenizer())
    trained(trainer)
    assert math.isfinite(trainer.state.log_history[0]["reward"])
    assert trainer.state.log_history[0]["reward_std"] > 0


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_evaluation_samples_from_the_mixture(tmp_path, several):
    held_out = Dataset.from_list(ROWS[:4])
    trainer = trainer_of(
        tmp_path, eval_dataset={"a": held_out, "b": held_out} if several else held_out,
        per_device_eval_batch_size=4, num_generations_eval=2,
    )  # fmt: skip
    trainer.evaluate()
    logged = [value for log in trainer.state.log_history for key, value in log.items() if key.endswith("_reward")]
    assert len(logged) == (2 if several else 1), trainer.state.log_history
    assert all(map(math.isfinite, logged))


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_scaled_as_in_trl(tmp_path, scale_rewards):
    trainer = trainer_of(tmp_path, scale_rewards=scale_rewards, loss_type="dapo")
    seen = []
    compute = trainer.compute_rewards
    trainer.compute_rewards = lambda *args: seen.append(compute(*args)) or seen[-1]
    batch = trainer._generate_and_score_completions([ROWS[0]] * 4 + [ROWS[1]] * 4)
    rewards_QG = seen[0][:, 0].view(2, 4)
    centred = rewards_QG - rewards_QG.mean(1, keepdim=True)
    scale = {
        "group": rewards_QG.std(1, keepdim=True) + 1e-4,
        "batch": rewards_QG.std() + 1e-4,
        "none": torch.ones(1),
    }[scale_rewards]
    torch.testing.assert_close(batch["advantages"], (centred / scale).flatten())


def test_truncated_completions_can_be_masked(tmp_path):
    trainer = trainer_of(tmp_path, mask_truncated_completions=True, loss_type="dapo")
    batch = trainer._generate_and_score_completions([ROWS[0]] * 8)
    ends = torch.tensor([2 in ids[mask.bool()].tolist() for ids, mask in zip(
        batch["completion_ids"], batch["completion_mask"], strict=True)])  # fmt: skip
    assert torch.equal(batch["completion_mask"].any(1), ends)


def test_a_custom_rollout_function_samples_the_completions(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = character_tokenizer()

    def rollouts(prompts, trainer):
        ids = tokenizer(prompts)["input_ids"]
        completions = [[4 + i % 5, 5, 2] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": [[1, 0, 1]] * len(ids)}

    trainer = trainer_of(tmp_path, rollout_func=rollouts)
    batch = trainer._generate_and_score_completions([ROWS[0]] * 8)
    assert batch["completion_ids"][:, 0].tolist() == [4, 5, 6, 7, 8, 4, 5, 6]
    assert batch["tool_mask"].tolist() == [[1, 0, 1]] * 8
    trained(trainer)


@pytest.mark.parametrize("option", [{"top_entropy_quantile": 0.5}, {"entropy_coef": 0.05}], ids=str)
def test_entropy_options_use_the_mixtures_entropy(tmp_path, option):
    trainer = trainer_of(tmp_path, loss_type="dapo", **option)
    _, log = trained(trainer)
    assert 0 < log["entropy"] <= math.log(VOCAB_SIZE)
