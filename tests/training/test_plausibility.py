"""Training a mixture with a plausibility cut: scored as it is sampled, or refused."""

import math

import pytest

from tests.helpers.distill import distiller_of
from tests.helpers.grpo import mixture, trainer_of


def cut(member):
    model = mixture()
    model.config.set_plausibility(0.2, member)
    return model


def test_a_cut_by_the_anchor_trains_with_the_reference_loss_head(tmp_path):
    trainer = trainer_of(tmp_path, cut("anchor"), loss_head="reference", max_steps=1)
    trainer.train()
    (step,) = [row for row in trainer.state.log_history if "loss" in row]
    assert math.isfinite(step["loss"])
    assert step["grad_norm"] > 0


def test_the_fused_loss_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'plausibility 0\.2, which the fused .* loss_head="reference"'):
        trainer_of(tmp_path, cut("anchor"))


def test_a_cut_by_the_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plausibility 0\.2 of the policy, which training moves"):
        trainer_of(tmp_path, cut("policy"), loss_head="reference")


def test_a_cut_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plausibility 0\.2: the tokens that it rules out have probability 0"):
        distiller_of(tmp_path, cut("anchor"), loss_head="reference")
