"""The trainer with the fused loss head trains as from the members' logits, at less cost."""

import copy

import pytest
import torch
from torch import nn
from transformers import set_seed

from logitmix.loss_head import log_probs as fused_head
from tests.helpers.grpo import LOSS_HEAD_MODELS, PROMPTS, generated, mixture, trainer_of

both_schemes = pytest.mark.parametrize("scheme", ["logit", "prob"])
all_models = pytest.mark.parametrize("model", LOSS_HEAD_MODELS)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    trainer.model.train()
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def pair(tmp_path, model, **kwargs):
    """Two trainers of copies of a model, with the fused and the reference loss head."""
    fused = trainer_of(tmp_path / "fused", copy.deepcopy(model), **kwargs)
    assert fused.args.loss_head == "fused", "the default"
    return fused, trainer_of(tmp_path / "reference", copy.deepcopy(model), loss_head="reference", **kwargs)


def trained(trainer) -> dict[str, torch.Tensor]:
    set_seed(0)  # of the sampling
    trainer.train()
    return trainer.model.state_dict()


# --- the same training -----------------------------------------------------------------------------------------------


@all_models
@pytest.mark.parametrize("is_first_update", [True, False], ids=["on policy", "off policy"])
def test_loss_gradients_and_metrics_match_the_reference(tmp_path, model, is_first_update):
    fused, reference = pair(tmp_path, LOSS_HEAD_MODELS[model](), temperature=0.8)
    inputs, _, _ = generated(reference)
    if is_first_update:
        del inputs["old_per_token_logps"]
    for trainer in (fused, reference):
        trainer._metrics["train"].clear()
    (loss, found), (expected_loss, expected) = (loss_and_gradients(t, inputs) for t in (fused, reference))
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-5)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * float(largest), rtol=1e-5, msg=name)
    metrics = dict(fused._metrics["train"])
    assert metrics.keys() == dict(reference._metrics["train"]).keys() >= {"mixture/kl_policy", "entropy"}
    for name, values in metrics.items():
        assert values == pytest.approx(reference._metrics["train"][name], rel=1e-4, abs=1e-6), name


@all_models
def test_several_updates_per_batch_of_rollouts_end_at_the_same_weights(tmp_path, model):
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "num_iterations": 2, "max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.0, "optim": "sgd",
    }  # fmt: skip
    fused, reference = (trained(trainer) for trainer in pair(tmp_path, LOSS_HEAD_MODELS[model](), **options))
    torch.testing.assert_close(fused, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence"},
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"delta": 1.3},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 3.0},
        {"epsilon": 0.1, "epsilon_high": 0.4},
        {"beta": 0.1, "kl_to": "anchor", "loss_type": "grpo"},
    ],
    ids=str,
)
def test_any_loss_of_trl(tmp_path, options):
    fused, reference = pair(tmp_path, mixture(), **options)
    inputs, _, _ = generated(reference)
    (loss, found), (expected_loss, expected) = (loss_and_gradients(t, inputs) for t in (fused, reference))
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * float(largest), rtol=1e-5, msg=name)


@pytest.mark.parametrize("model", ["untied heads", "one frozen head"])
def test_with_gradient_checkpointing(tmp_path, model):
    options = {"gradient_checkpointing": True, "optim": "sgd", "learning_rate": 1e-3}
    fused, reference = (trained(trainer) for trainer in pair(tmp_path, LOSS_HEAD_MODELS[model](), **options))
    torch.testing.assert_close(fused, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["untied heads", "prob", "one frozen head"])
def test_bfloat16_is_as_accurate_as_the_reference(tmp_path, model):
    """Under autocast, the trainer's default, its error is at most that of the reference loss head."""
    model = LOSS_HEAD_MODELS[model]()
    truth = trainer_of(tmp_path / "float32", copy.deepcopy(model), loss_head="reference")
    inputs, _, _ = generated(truth)
    _, true = loss_and_gradients(truth, inputs)
    errors = []
    for trainer in pair(tmp_path, model, bf16=True):
        _, found = loss_and_gradients(trainer, inputs)
        errors.append(sum((found[name] - true[name]).square().sum() for name in true).sqrt().item())
    assert 0 < errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "float32"])
@pytest.mark.parametrize("states", ["keep", "recompute", "reference"])
@pytest.mark.parametrize("model", LOSS_HEAD_MODELS)
def test_the_ratio_is_exactly_1_before_an_update(tmp_path, model, states, bf16):
    """In the first of two passes over the same rollouts, whose old log-probs were scored for all of them at once."""
    options = {"loss_head": "reference"} if states == "reference" else {"anchor_states": states}
    trainer = trainer_of(
        tmp_path, LOSS_HEAD_MODELS[model](), per_device_train_batch_size=6, gradient_accumulation_steps=2,
        num_iterations=2, max_steps=1, bf16=bf16, **options,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["ratio/min"], log["ratio/max"]) == (1.0, 1.0)


# --- its cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 1), ({"loss_type": "grpo"}, 1), ({"beta": 0.1, "kl_to": "anchor", "loss_type": "grpo"}, 1),
     ({"beta": 0.1, "kl_to": "anchor", "loss_type": "grpo", "use_bias_correction_kl": False}, 1),
     ({"importance_sampling_level": "sequence"}, 2), ({"top_entropy_quantile": 0.5}, 2)],
    ids=str,
)  # fmt: skip
def test_losses_that_are_sums_over_tokens_need_one_pass(tmp_path, monkeypatch, options, passes):
    trainer = trainer_of(tmp_path, **options)
    inputs, _, _ = generated(trainer)
    taken, run = [], fused_head.run_passes
    monkeypatch.setattr(fused_head, "run_passes", lambda *args: taken.append(1) or run(*args))
    loss_and_gradients(trainer, inputs)
    assert len(taken) == passes


def test_only_completion_tokens_are_projected(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    inputs, _, _ = generated(trainer)
    tokens, run = [], fused_head.run_passes
    monkeypatch.setattr(
        fused_head, "run_passes", lambda inputs, *args: tokens.append(len(inputs.targets_N)) or run(inputs, *args)
    )
    trainer._compute_loss(trainer.model, inputs)
    assert tokens == [inputs["completion_mask"].sum().item()]
    assert tokens[0] < inputs["completion_mask"].numel(), "some completions are padded"


def runs_of(member) -> list[bool]:
    runs = []
    member.get_decoder().register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    return runs


UPDATES = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "num_iterations": 2, "max_steps": 6}


@pytest.mark.parametrize(("states", "runs"), [("keep", 3), ("offload", 3), ("recompute", 3 + 6)])
def test_the_anchor_runs_once_per_batch_of_rollouts(tmp_path, states, runs):
    trainer = trainer_of(tmp_path, anchor_states=states, **UPDATES)
    anchor, policy = (runs_of(member) for member in (trainer.model.anchor_0, trainer.model.policy))
    sample = trainer.decode
    trainer.decode = lambda *args, **kwargs: (sample(*args, **kwargs), anchor.clear(), policy.clear())[0]
    trainer.train()
    assert len(anchor) == runs  # the old policy is scored in micro-batches
    assert len(policy) == 3 + 6


@both_schemes
@pytest.mark.parametrize("states", ["keep", "offload"])
def test_kept_states_do_not_change_training(tmp_path, scheme, states):
    options = UPDATES | {"max_steps": 12, "optim": "sgd", "learning_rate": 1e-3}
    weights = []
    for choice in (states, "recompute"):
        trainer = trainer_of(tmp_path / choice, mixture(scheme), anchor_states=choice, **options)
        weights.append(trained(trainer))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)


def test_states_are_kept_of_completion_tokens_if_requested(tmp_path):
    for states in ("keep", "recompute"):
        trainer = trainer_of(tmp_path / states, anchor_states=states, **UPDATES)
        trainer.model.train()
        inputs = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(4)])
        assert ("anchor_states" in inputs) == (states == "keep")
        if states == "keep":
            lengths = [len(of_sequence["anchor_0"]) for of_sequence in inputs["anchor_states"]]
            assert lengths == inputs["completion_mask"].sum(1).tolist()


def test_refilled_batches_keep_no_states(tmp_path):
    trainer = trainer_of(tmp_path, dynamic_sampling="refill", **UPDATES)
    trainer.train()
    assert "anchor_states" not in trainer._buffered_inputs[0]


# --- what is refused -------------------------------------------------------------------------------------------------


def strange_mixture():
    model = mixture()
    model.anchor_0.lm_head = nn.Sequential(model.anchor_0.lm_head)
    return model


def test_an_unreadable_head_is_rejected_and_trains_with_the_reference(tmp_path):
    with pytest.raises(
        ValueError, match=r'the head of anchor_0: its output head is a Sequential.*loss_head="reference"'
    ):
        trainer_of(tmp_path, strange_mixture())
    trainer_of(tmp_path, strange_mixture(), loss_head="reference", max_steps=1).train()


@pytest.mark.parametrize("option", ["loss_head", "anchor_states"])
def test_unknown_choices_are_rejected(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} is 'liger'; it must be one of"):
        trainer_of(tmp_path, **{option: "liger"})


def test_a_parameter_that_is_not_finite_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, loss_type="group")
    inputs, _, _ = generated(trainer)
    with torch.no_grad():
        trainer.model.policy.get_decoder().layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    trainer.model.train()
    with pytest.raises(FloatingPointError, match="policy"):
        trainer._compute_loss(trainer.model, inputs)
