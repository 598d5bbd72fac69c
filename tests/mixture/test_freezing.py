"""What trains in a mixture: the policy; the anchors are frozen."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import (
    INPUT,
    gradients,
    is_frozen,
    logits,
    tiny_member,
)


def test_anchors_are_frozen_from_the_start_and_stay_frozen(model, tmp_path):
    assert is_frozen(model)
    assert all(p.requires_grad for p in model.policy.parameters())
    model.train()
    assert model.policy.training
    assert is_frozen(model)
    model.requires_grad_(True)
    assert is_frozen(model)
    model.gradient_checkpointing_enable()
    assert is_frozen(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_frozen(loaded)
    assert all(p.requires_grad for p in loaded.policy.parameters())
    assert is_frozen(copy.deepcopy(model))


def test_anchors_have_no_dropout_while_the_policy_trains():
    members = [tiny_member("llama", seed, attention_dropout=0.5) for seed in (0, 1)]
    model = LogitMixForCausalLM.from_members(*members).train()
    assert torch.equal(logits(model, alpha=1.0), logits(model, alpha=1.0))
    assert not torch.equal(logits(model, alpha=0.0), logits(model, alpha=0.0))


def test_gradients_reach_only_the_policy_scaled_by_its_weight(model, pair):
    """Eq. 6: the factor is (1 - alpha), and the anchor's logits are a constant."""
    policy = copy.deepcopy(pair[0])
    z_policy = policy(**INPUT).logits
    z_mix = (0.7 * z_policy + 0.3 * logits(pair[1])).detach().requires_grad_()
    torch.nn.functional.cross_entropy(z_mix[:, :-1].flatten(0, 1), INPUT["input_ids"][:, 1:].flatten()).backward()
    z_policy.backward((1 - 0.3) * z_mix.grad)

    actual = gradients(model.train())
    assert all(name.startswith("policy.") for name in actual)
    assert {name.removeprefix("policy.") for name in actual} == {name for name, _ in policy.named_parameters()}
    for name, p in policy.named_parameters():
        torch.testing.assert_close(actual[f"policy.{name}"], p.grad)


def test_no_gradient_reaches_an_anchor_with_unfrozen_parameters(model):
    """Code that iterates over `model.parameters()` may unfreeze them."""
    for p in model.parameters():
        p.requires_grad = True
    assert all(name.startswith("policy.") for name in gradients(model.train()))


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing_does_not_change_the_gradients(model, arguments):
    expected = gradients(model.train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if arguments == {"use_reentrant": True}:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_an_optimizer_step_changes_only_the_policy(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model.train())
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("anchor_0."))
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("policy."))


def test_an_adapter_added_by_peft_trains_merges_and_saves(model, tmp_path):
    adapter = LoraConfig(target_modules=r"policy\..*q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, adapter).train()
    adapted(**INPUT, labels=INPUT["input_ids"]).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".policy." in name and "lora_" in name for name in trained)
    expected = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
