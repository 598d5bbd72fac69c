"""`train_target="policy"`: the mixture samples, and the policy alone is trained by importance weights."""

import pytest
import torch

from tests.helpers.grpo import PROMPTS, mixture, trainer_of
from tests.helpers.members import VOCAB_SIZE

UNCLIPPED = {"epsilon": 0.999, "epsilon_high": 1e6}
KL = {"beta": 0.1, "kl_to": "anchor", "loss_type": "grpo"}
LOSSES = {
    "unclipped": UNCLIPPED | {"loss_type": "dapo"},
    "clipped": {"epsilon": 0.1, "loss_type": "dapo"},
    "truncated": {"epsilon_high": 1.1, "loss_type": "cispo"},
}


def policy_trainer(tmp_path, model=None, **options):
    return trainer_of(tmp_path, model, train_target="policy", **options)


def prompt_of(trainer):
    return torch.tensor(trainer.processing_class([PROMPTS[0]])["input_ids"])


def every_token(trainer, advantages_V, sampled_V):
    """A batch whose loss is the expectation over the mixture: each token once, its advantage times V times its chance.

    min(ρA, clip(ρ)A) and TRL's truncated term scale with a positive factor on A.
    """
    prompt = prompt_of(trainer).expand(VOCAB_SIZE, -1)
    ones = torch.ones(VOCAB_SIZE, 1, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.arange(VOCAB_SIZE)[:, None],
        "completion_mask": ones,
        "advantages": advantages_V * sampled_V * VOCAB_SIZE,
        "num_items_in_batch": torch.tensor(VOCAB_SIZE),
    }


def naive_expectation(policy_V, sampled_V, advantages_V, loss):
    ratio_V = policy_V / sampled_V
    if loss == "truncated":
        term_V = ratio_V.clamp(max=1.1).detach() * policy_V.log() * advantages_V
    else:
        low, high = (0.9, 1.1) if loss == "clipped" else (0, 1e9)
        term_V = torch.minimum(ratio_V * advantages_V, ratio_V.clamp(low, high) * advantages_V)
    return -(sampled_V * term_V).sum()


@pytest.mark.parametrize("loss_head", ["fused", "reference"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_enumerated_expectation_over_the_mixture(tmp_path, loss, scheme, loss_head):
    """Unclipped, it is also the gradient of the policy's own expected advantage."""
    trainer = policy_trainer(tmp_path, mixture(scheme), loss_head=loss_head, **LOSSES[loss])
    model, prompt = trainer.model, prompt_of(trainer)
    advantages_V = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    sampled_V = model(prompt).logits[0, -1].softmax(-1).detach()
    batch = every_token(trainer, advantages_V, sampled_V)
    batch["old_per_token_logps"] = sampled_V.log()[:, None]
    parameters = [p for p in model.policy.parameters() if p.requires_grad]

    model.train()
    actual = torch.autograd.grad(trainer.loss(model, batch), parameters)

    policy_V = model.policy(prompt).logits[0, -1].softmax(-1)
    assert ((policy_V / sampled_V - 1).abs() > 0.1).any()  # the bounds act
    expected = torch.autograd.grad(naive_expectation(policy_V, sampled_V, advantages_V, loss), parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    if loss == "unclipped":
        policy_V = model.policy(prompt).logits[0, -1].softmax(-1)
        own = torch.autograd.grad(-(policy_V * advantages_V).sum(), parameters)
        torch.testing.assert_close(actual, own, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}], ids=["one update", "two updates"])
def test_rollouts_are_weighed_by_the_mixture_that_sampled_them(tmp_path, options):
    trainer = policy_trainer(tmp_path, **options)
    torch.manual_seed(3)
    trainer.model.train()
    batch = trainer.make_batch([{"prompt": prompt} for prompt in PROMPTS for _ in range(4)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    T = batch["completion_ids"].shape[1]
    mixed, _, _ = trainer.score_tokens(trainer.model.eval().requires_grad_(False), ids, mask, T)
    own = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["old_per_token_logps"][own], mixed.detach()[own])
    policy = trainer.score(trainer.model, batch, "dapo").log_probs
    assert (policy - mixed)[own].abs().max() > 0.01
    assert "anchor_states" not in batch


def test_training_moves_the_policy_only(tmp_path):
    trainer = policy_trainer(tmp_path, mixture(alpha=0.5))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(name.startswith("policy.") for name in moved)


def test_alpha_goes_to_zero_while_the_policy_trains(tmp_path):
    trainer = policy_trainer(tmp_path, mixture(alpha=0.5), alpha_controller="linear", alpha_end=0.0, max_steps=3)
    trainer.train()
    assert trainer.model.alpha == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_truncated": True, "top_k": 5}, "score_truncated is set"),
        (KL | {"use_bias_correction_kl": False}, "set use_bias_correction_kl"),
        ({"train_target": "student"}, "it must be one of 'mixture', 'policy'"),
    ],
)
def test_what_would_make_the_weights_wrong_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **{"train_target": "policy"} | options)


def test_a_model_without_an_anchor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_target is 'policy', but the model has no anchor"):
        policy_trainer(tmp_path, mixture().policy)
