"""The alpha controller that keeps a KL budget: the KL at its alpha, in training, and what is refused."""

import pytest
import torch

from logitmix.mixture.diagnostics import mixture_diagnostics
from logitmix.mixture.mixing import mix_logits
from logitmix.training.alpha.kl_budget import HIGHEST, alpha_within_budget, member_log_probs
from tests.helpers.grpo import generated, mixture, trainer_of


def kl_of_the_batch(trainer, inputs, ids, mask, alpha):
    """Mean KL(mixture ‖ anchor) over completion tokens, from whole logits in float64."""
    length = inputs["completion_ids"].shape[1]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    policy, anchor = (
        member(ids, attention_mask=mask, position_ids=position_ids).logits[:, -length - 1 : -1].double()
        for member in trainer.model.members
    )
    mixed = mix_logits([policy, anchor], (1 - alpha, alpha))
    kl = mixture_diagnostics([policy, anchor], mixed, trainer.temperature).kl_K[..., 1]
    return kl[:4][inputs["completion_mask"][:4].bool()].mean().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mixture_uses_the_budget_up(tmp_path, temperature):
    trainer = trainer_of(tmp_path, temperature=temperature)
    inputs, ids, mask = generated(trainer)
    with torch.no_grad():
        budget = kl_of_the_batch(trainer, inputs, ids, mask, 0.3)
    assert alpha_within_budget(trainer, inputs, budget) == pytest.approx(0.3, abs=1e-3)
    assert alpha_within_budget(trainer, inputs, 1e9) == 0.0
    assert alpha_within_budget(trainer, inputs, 1e-9) == HIGHEST
    policy, anchor = member_log_probs(trainer, inputs)
    assert len(policy) == len(anchor) == inputs["completion_mask"][:4].sum()


def test_rollouts_without_a_token_that_counts_leave_alpha(tmp_path):
    """As where all are cut and mask_truncated_completions masks them."""
    trainer = trainer_of(tmp_path)
    inputs, *_ = generated(trainer)
    trainer.model.config.set_weights([0.7, 0.3])
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    assert alpha_within_budget(trainer, inputs, 1e-9) == pytest.approx(0.3)


def test_a_mixture_that_rules_out_tokens_is_refused(tmp_path):
    cut = mixture()
    cut.config.set_plausibility(0.1, "anchor")
    with pytest.raises(ValueError, match=r"but this one has plausibility 0.1, which rules out tokens"):
        trainer_of(tmp_path, alpha_controller="kl_budget", kl_budget=0.1, model=cut)


def test_alpha_follows_the_budget_in_training_and_stays_within_an_outer_step(tmp_path):
    trainer = trainer_of(
        tmp_path, alpha_controller="kl_budget", kl_budget=0.2, max_steps=6, per_device_train_batch_size=4,
        steps_per_generation=3, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    alphas = [row["alpha"] for row in trainer.state.log_history if "alpha" in row]
    first, second = set(alphas[:3]), set(alphas[3:])
    assert first == {0.4}, "the start is alpha"
    assert len(second) == 1
    assert second != first
    assert 0 < trainer.model.alpha <= HIGHEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_controller": "kl_budget"}, "kl_budget goes with kl_budget, and is required there"),
        ({"kl_budget": 0.1}, "alpha_controller is 'fixed' and kl_budget is 0.1"),
        ({"alpha_controller": "kl_budget", "kl_budget": 0.0}, "kl_budget is 0.0, but must be above 0"),
        (
            {"alpha_controller": "kl_budget", "kl_budget": 0.1, "model": mixture("prob")},
            "needs scheme 'logit', whose KL to the anchor falls with alpha; scheme is 'prob'",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)
