"""Numbers that are not finite stop a step before its update and save the batch."""

import copy
import math
import re

import pytest
import torch
from transformers import TrainerCallback

from logitmix.training.monitoring.finite import broken_parameter, broken_reward
from tests.helpers.grpo import PROMPTS, count_vowels, mixture, trainer_of
from tests.helpers.torchrun import run_two_processes

NAN, INF = math.nan, math.inf


class AtStep(TrainerCallback):
    """Copies the weights and the optimizer's state at the start of a step, then corrupts the run."""

    def __init__(self, trainer, step, fault):
        self.trainer, self.step, self.fault = trainer, step, fault

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.fault(self.trainer)
            self.weights = copy.deepcopy(self.trainer.model.state_dict())
            self.optimizer = copy.deepcopy(self.trainer.optimizer.state_dict())


def stopped(trainer, step, fault):
    """The error that ends the training; checks that weights and optimizer are unchanged bit for bit."""
    before = AtStep(trainer, step, fault)
    trainer.add_callback(before)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert trainer.state.global_step == step
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before.weights[name]) or value.isnan().any(), name
    state = trainer.optimizer.state_dict()["state"]
    assert state.keys() == before.optimizer["state"].keys()
    for index, moments in state.items():
        for name, value in moments.items():
            assert torch.equal(value, before.optimizer["state"][index][name]), (index, name)
    assert (step == 0) == (not state)
    return str(error.value)


def break_anchor(trainer):
    with torch.no_grad():
        trainer.model.anchor_0.get_input_embeddings().weight.fill_(NAN)


def break_gradient(trainer):
    trainer.model.policy.get_input_embeddings().weight.register_hook(lambda gradient: gradient * INF)


OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 1, "max_steps": 4}  # the second step samples nothing


def test_logits_that_are_not_finite_stop_the_step_and_their_member_is_named(tmp_path):
    trainer = trainer_of(tmp_path, anchor_states="recompute", **OFF_POLICY)
    message = stopped(trainer, 1, break_anchor)
    assert "step 2 stopped, with the weights as they were before it" in message
    assert "the log-probability is not finite (nor are the logits of the anchor)" in message
    assert str(tmp_path / "nonfinite-step-2") in message
    saved = torch.load(tmp_path / "nonfinite-step-2" / "rank-0.pt")
    (batch,) = saved["batches"]
    assert {"prompt_ids", "completion_mask", "advantages", "rewards", "old_per_token_logps"} < set(batch)
    assert len(batch["completions"]) == 12
    assert batch["rewards"][:, 0].tolist() == count_vowels(
        [re.sub("<pad>|<bos>|<eos>", "", completion) for completion in batch["completions"]]
    )
    assert set(batch["prompts"]) <= set(PROMPTS)


def test_a_gradient_that_is_not_finite_stops_the_step_with_all_its_batches(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    message = stopped(trainer, 1, break_gradient)
    assert "the gradient's norm is nan" in message or "the gradient's norm is inf" in message
    saved = torch.load(tmp_path / "nonfinite-step-2" / "rank-0.pt")
    assert [len(batch["completions"]) for batch in saved["batches"]] == [4, 4, 4]


def test_a_loss_that_is_not_finite_stops_the_step(tmp_path):
    def break_advantages(trainer):
        for batch in trainer._buffered_inputs:
            batch["advantages"][3] = INF

    message = stopped(trainer_of(tmp_path, **OFF_POLICY), 1, break_advantages)
    assert "the loss is not finite. The batch" in message, "the members' logits are finite"


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_reward_that_is_not_finite_stops_the_step(tmp_path, value):
    values = []

    def reward(completions, **kwargs):
        return [values.pop() if values else 1.0 for _ in completions]

    alone = math.isnan(value)  # beside another function's number, NaN is TRL's None
    trainer = trainer_of(tmp_path, reward=reward if alone else [reward, count_vowels])
    message = stopped(trainer, 1, lambda _: values.extend([value, 0.0, 0.0]))
    assert "the reward function 'reward' gave" in message
    assert "for completion 2, '" in message
    saved = torch.load(tmp_path / "nonfinite-step-2" / "rank-0.pt")
    assert saved["rewards"].shape[0] == len(saved["completions"]) == 12
    assert not torch.isfinite(saved["rewards"][2]).all()


def test_a_reward_of_none_is_no_fault_while_another_function_gives_one(tmp_path):
    def sometimes(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = trainer_of(tmp_path, reward=[sometimes, count_vowels])
    trainer.train()
    assert trainer.state.global_step == 2


def test_which_reward_is_broken():
    weights, names = torch.tensor([1.0, 0.5]), ["a", "b"]
    assert broken_reward(torch.tensor([[1.0, NAN], [NAN, 0.0]]), weights, names) is None
    assert broken_reward(torch.tensor([[1.0, 2.0], [NAN, -INF]]), weights, names) == (
        1,
        "the reward function 'b' gave -inf",
    )
    row, fault = broken_reward(torch.tensor([[1.0, 2.0], [0.0, 0.0], [NAN, NAN]]), weights, names)
    assert (row, fault) == (2, "the reward function 'a' and 'b' gave None or NaN")


def test_logits_that_are_not_finite_while_sampling_stop_the_step(tmp_path):
    message = stopped(trainer_of(tmp_path), 1, break_anchor)
    assert "a logit was not finite while sampling (the parameter anchor_0." in message
    assert torch.load(tmp_path / "nonfinite-step-2" / "rank-0.pt")["prompts"]


def test_parameters_that_are_elsewhere_are_not_looked_at():
    assert broken_parameter(torch.nn.ParameterList([torch.empty(0)])) is None
    eight_bit = torch.nn.Linear(2, 3, dtype=torch.float8_e4m3fn, device="meta")
    assert broken_parameter(eight_bit) is None


@pytest.mark.parametrize("member", ["policy", "anchor_0"])
def test_a_model_that_is_broken_from_the_start_is_refused(tmp_path, member):
    model = mixture()
    parameter = dict(getattr(model, member).named_parameters())["model.norm.weight"]
    with torch.no_grad():
        parameter[0] = INF
    with pytest.raises(ValueError, match=rf"the parameter {member}\.model\.norm\.weight holds values that are"):
        trainer_of(tmp_path, model)


def test_a_batch_that_cannot_be_saved_still_stops_the_step(tmp_path):
    trainer = trainer_of(tmp_path, anchor_states="recompute", **OFF_POLICY)
    (tmp_path / "nonfinite-step-2").write_text("in the way")
    assert "The batch could not be saved in" in stopped(trainer, 1, break_anchor)


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import torch
    from tests.training.test_finite import INF, OFF_POLICY, stopped
    from tests.helpers.grpo import trainer_of
    trainer = trainer_of(Path(sys.argv[1]), per_device_train_batch_size=6, ddp_backend="gloo", **OFF_POLICY)

    def break_advantages_of_one_process(trainer):
        if trainer.accelerator.process_index == 1:
            trainer._buffered_inputs[0]["advantages"][3] = INF

    message = stopped(trainer, 1, break_advantages_of_one_process)
    assert "the loss is not finite. The batch" in message
    print("stopped", flush=True)
"""


@pytest.mark.slow
def test_processes_stop_together_and_each_saves_its_batch(tmp_path):
    assert run_two_processes(TWO_PROCESSES, tmp_path).count("stopped") == 2
    advantages = [
        torch.load(tmp_path / "run" / "nonfinite-step-2" / f"rank-{rank}.pt")["batches"][0]["advantages"]
        for rank in (0, 1)
    ]
    assert [a.isinf().any().item() for a in advantages] == [False, True]
