"""The load-balancing loss of a mixture-of-experts policy, against TRL's own trainer."""

import copy

import pytest
import torch
from trl import GRPOTrainer

from logitmix import LogitMixForCausalLM
from tests.helpers.architectures import tiny_causal_model
from tests.helpers.grpo import generated, trainer_of
from tests.helpers.members import tiny_member

HEADS = ("fused", "reference")


def loss_and_gradients(trainer, batch, policy):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_head", HEADS)
@pytest.mark.parametrize("coefficient", [None, 0.5], ids=["of-the-config", "of-the-options"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_loss_at_alpha_0_is_trls_with_the_load_balancing_loss(tmp_path, model_type, coefficient, loss_head):
    policy = tiny_causal_model(model_type)
    options = {"loss_type": "dapo", "router_aux_loss_coef": coefficient, "temperature": 0.7}
    theirs = trainer_of(tmp_path, copy.deepcopy(policy), trainer=GRPOTrainer, **options)
    model = LogitMixForCausalLM.from_members(policy, tiny_causal_model(model_type, 1), alpha=0.0)
    ours = trainer_of(tmp_path, model, loss_head=loss_head, **options)
    assert ours.router_aux_loss_coef == theirs.router_aux_loss_coef > 0
    batch, *_ = generated(ours)
    for trainer in (ours, theirs):
        trainer.model.train()
    loss, gradients = loss_and_gradients(ours, batch, model.policy)
    expected, expected_gradients = loss_and_gradients(theirs, batch, theirs.model)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    assert ours.step_metrics["aux_loss"] == pytest.approx(theirs._metrics["train"]["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("loss_head", HEADS)
@pytest.mark.parametrize("anchor", ["qwen3_moe", "dense"])
def test_the_frozen_anchor_adds_nothing_to_it(tmp_path, anchor, loss_head):
    frozen = tiny_causal_model("qwen3_moe", 1) if anchor == "qwen3_moe" else tiny_member("qwen2", 1)
    policy = tiny_causal_model("qwen3_moe")
    losses = {}
    for alpha in (0.0, 0.6):
        model = LogitMixForCausalLM.from_members(copy.deepcopy(policy), copy.deepcopy(frozen), alpha=alpha)
        trainer = trainer_of(tmp_path, model, loss_head=loss_head)
        if not losses:
            batch, *_ = generated(trainer)
        loss_and_gradients(trainer, batch, model)
        losses[alpha] = trainer.step_metrics["aux_loss"]
        assert all(p.grad is None for p in model.anchors[0].parameters())
    assert losses[0.0] == pytest.approx(losses[0.6], rel=1e-6)


@pytest.mark.parametrize("loss_head", HEADS)
def test_a_mixture_of_experts_trains_with_it(tmp_path, loss_head):
    model = LogitMixForCausalLM.from_members(tiny_causal_model("qwen3_moe"), tiny_causal_model("qwen3_moe", 1))
    trainer = trainer_of(tmp_path, model, loss_head=loss_head)
    trainer.train()
    logs = [log["aux_loss"] for log in trainer.state.log_history if "aux_loss" in log]
    assert len(logs) == 2
    assert all(log > 0 for log in logs)


def test_a_dense_policy_has_none(tmp_path):
    trainer = trainer_of(tmp_path)
    assert not trainer.aux_loss_enabled
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        trainer_of(tmp_path, router_aux_loss_coef=0.1)
