"""TRL's tools and environments with a mixture: a tiny policy and anchor that know one tool call by heart."""

import copy

import pytest
import torch
from datasets import Dataset

from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.tools import ANSWER, CALL, RESULT, add, tool_mixture, tool_tokenizer, tool_user


async def slow_add(a: int, b: int) -> int:
    return a + b


slow_add.__doc__, slow_add.__name__ = add.__doc__, "add"


class Calculator:
    """An environment that asks the question itself and pays for each use of its tool."""

    def reset(self, **row: object) -> str | None:
        self.calls = 0
        return "4"

    def add(self, a: int, b: int) -> int:
        """Add two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            Their sum.
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        return float(self.calls)


class Asker(Calculator):
    """An environment that writes the whole question."""

    def reset(self, **row: object) -> str | None:
        super().reset()
        return "3+4"


@pytest.fixture(scope="module")
def tokenizer():
    return tool_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    return tool_user(tokenizer)


@pytest.fixture
def mixture(policy):
    return tool_mixture(policy)


def lengths(completions, **kwargs):
    """The number of messages, and a little that differs within a group."""
    return [len(completion) + i / 100 for i, completion in enumerate(completions)]


def trainer_of(tmp_path, model, tokenizer, dataset=None, reward=lengths, config=None, **kwargs):
    arguments = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 200, "max_steps": 1,
        "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True, "temperature": 0.2,
    } | (config or {})  # fmt: skip
    return LogitMixGRPOTrainer(
        model,
        reward_funcs=reward,
        args=LogitMixGRPOConfig(str(tmp_path), **arguments),
        train_dataset=dataset,
        processing_class=tokenizer,
        **kwargs,
    )


def questions(content="3+4", **columns):
    messages = [{"role": "user", "content": content}]
    return Dataset.from_list([{"prompt": messages} | columns] * 4)


def rollouts(trainer):
    """TRL's batch of four rollouts of a question."""
    return trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)


@pytest.mark.parametrize("tool", [add, slow_add], ids=["sync", "async"])
def test_a_rollout_calls_the_tool_and_reads_its_result(tmp_path, mixture, tokenizer, tool):
    trainer = trainer_of(tmp_path, mixture, tokenizer, questions(), tools=[tool])
    batch = rollouts(trainer)
    expected = CALL + RESULT + ANSWER
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert texts.count(expected) >= 2, texts


def test_exactly_the_tools_tokens_are_masked(tmp_path, mixture, tokenizer):
    batch = rollouts(trainer_of(tmp_path, mixture, tokenizer, questions(), tools=[add]))
    called = 0
    for ids, mask, own in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
        ids, own = ids[mask.bool()], own[mask.bool()].bool()
        if tokenizer.decode(ids) == CALL + RESULT + ANSWER:
            assert tokenizer.decode(ids[~own]) == RESULT
            assert tokenizer.decode(ids[own]) == CALL + ANSWER
            called += 1
    assert called >= 2


@pytest.mark.parametrize("loss_type", ["group", "dapo", "grpo"])
def test_the_tools_tokens_do_not_count_in_the_loss(tmp_path, mixture, tokenizer, loss_type):
    """Neither in its value, nor in its gradient, nor in the normaliser, whichever loss head computes it."""
    found = []
    for loss_head in ("fused", "reference"):
        config = {"loss_head": loss_head, "loss_type": loss_type}
        trainer = trainer_of(
            tmp_path / loss_head, copy.deepcopy(mixture), tokenizer, questions(), config=config, tools=[add]
        )
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(0)
        batch = rollouts(trainer)
        # scores and advantages with a gradient, although the rollouts are by heart and all the same
        trainer.args.temperature = trainer.temperature = 2.0
        batch["advantages"] = torch.tensor([1.0, 0.5, -0.2, 2.0])
        with torch.no_grad():
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            old = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, batch["completion_ids"].shape[1]
            )[0]
        own = batch["tool_mask"] * batch["completion_mask"]
        assert own.sum() < batch["completion_mask"].sum(), "a tool was called"
        for shift in (0.0, 5.0):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, batch | {"old_per_token_logps": old + shift * (1 - own)})
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in trainer.model.parameters() if p.grad is not None)])
        assert max(gradient.abs().max() for gradient in found[-1][1:]) > 1e-3
        # the normaliser: by hand from the policy's own tokens
        ratio_free = -(batch["advantages"][:, None] * own)
        by_hand = {
            "group": ratio_free.sum() / own.sum(),
            "dapo": ratio_free.sum() / own.sum(),
            "grpo": (ratio_free.sum(1) / own.sum(1)).mean(),
        }[loss_type]
        torch.testing.assert_close(found[-1][0], by_hand, atol=1e-5, rtol=1e-4)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("environment", "dataset"),
    [
        (Calculator, questions("3+")),
        (Asker, None),
        ({"asks": Asker, "adds": Calculator}, Dataset.from_list([{"environment": "asks"}] * 4)),
        (
            {"asks": Asker, "adds": Calculator},
            Dataset.from_list([{"environment": "adds", "prompt": [{"role": "user", "content": "3+"}]}] * 4),
        ),
    ],
    ids=["completes the prompt", "without a data set", "without a prompt", "of several"],
)
def test_an_environment_writes_prompts_and_pays_rewards(tmp_path, mixture, tokenizer, environment, dataset):
    trainer = trainer_of(
        tmp_path, mixture, tokenizer, dataset, environment_factory=environment, config={"log_completions": True}
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] >= 0.5
    assert log["tools/failure_frequency"] == 0
    paid = [log[key] for key in ("rewards/Asker/mean", "rewards/Calculator/mean") if log.get(key) is not None]
    assert paid == [pytest.approx(log["tools/call_frequency"])]
    assert [prompt[-1]["content"] for prompt in trainer.completion_log["prompt"]] == ["3+4"] * 4


def test_a_prompt_that_an_environment_makes_too_long_is_refused(tmp_path, mixture, tokenizer):
    class Rambler(Asker):
        def reset(self, **row: object) -> str | None:
            return super().reset(**row) + " " * 300

    trainer = trainer_of(tmp_path, mixture, tokenizer, environment_factory=Rambler)
    with pytest.raises(ValueError, match=r"prompt 0 has \d+ tokens; with max_completion_length 200 that exceeds"):
        trainer.train()


def test_refills_work_with_tools(tmp_path, mixture, tokenizer):
    """Groups of equal rewards are replaced by others, with the masks of their tools."""
    drawn = iter(range(100))

    def alternating(completions, **kwargs):
        first = next(drawn) == 0
        return [1.0 if first else float(i % 2) for i in range(len(completions))]

    config = {"dynamic_sampling": "refill", "max_refills": 2}
    trainer = trainer_of(tmp_path, mixture, tokenizer, questions(), alternating, config, tools=[add])
    trainer.train()
    assert trainer.state.log_history[0]["groups/kept"] == 1
    assert trainer.state.log_history[0]["ratio/max"] == 1


def test_lengths_count_the_policys_own_tokens_beside_stop_strings(tmp_path, mixture, tokenizer):
    logged = []
    for stop in (None, ["never written"]):
        torch.manual_seed(0)
        trainer = trainer_of(
            tmp_path, copy.deepcopy(mixture), tokenizer, questions(), config={"stop_strings": stop}, tools=[add]
        )
        trainer.train()
        logged.append({k: v for k, v in trainer.state.log_history[0].items() if k.startswith("completions/")})
    assert logged[0] == logged[1]


@pytest.mark.parametrize("option", [{"tools": [add]}, {"environment_factory": Asker}], ids=["tools", "environment"])
def test_validation_with_tools_is_refused(tmp_path, mixture, tokenizer, option):
    config = {"alpha_controller": "adaptive", "validation_size": 2}
    with pytest.raises(ValueError, match="cannot be used with alpha_controller 'adaptive'"):
        trainer_of(tmp_path, mixture, tokenizer, questions(), config=config, **option)
