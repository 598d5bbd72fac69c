"""Members as LoRA adapters: a policy with a full anchor, two on one base, and one with its base as the anchor."""

import copy
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import (
    KINDS,
    VARIANTS,
    anchor_of,
    lora,
    merged_mixture,
    mixture,
    reference,
    save_adapter,
)
from tests.helpers.members import INPUT, gradients, logits, tiny_member

# --- the members ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_has_the_logits_of_transformers_and_peft(kind, folders):
    model = mixture(kind, folders)
    torch.testing.assert_close(logits(model, alpha=0.0), logits(reference(folders["policy adapter"])))
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(anchor_of(kind, folders))))
    policy, anchor = logits(model, alpha=0.0), logits(model, alpha=1.0)
    assert (policy - anchor).abs().max() > 0.1
    torch.testing.assert_close(logits(model), 0.7 * policy + 0.3 * anchor)
    rows = logits(model, alpha=torch.tensor([0.0, 0.6]))
    torch.testing.assert_close(rows[0], policy[0])
    torch.testing.assert_close(rows[1], 0.4 * policy[1] + 0.6 * anchor[1])


@pytest.mark.parametrize(("kind", "held"), zip(KINDS, [2, 1, 1], strict=True))
def test_members_on_one_base_share_its_weights(kind, held, folders):
    model = mixture(kind, folders)
    size = sum(p.numel() for p in reference(folders["base"]).parameters())
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(p.numel() for p in model.parameters()) == held * size + adapters
    assert model.weight_bytes() == (4 * (held * size + adapters), 4 * (2 - held) * size)
    assert len(model.anchors) == held - 1
    assert len(model.members) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_starts_as_the_base_and_only_it_trains(kind, folders):
    model = LogitMixForCausalLM.from_members(folders["base"], anchor_of(kind, folders), peft_config=lora())
    torch.testing.assert_close(logits(model, alpha=0.0), logits(reference(folders["base"])))
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(anchor_of(kind, folders))))
    for change in (model.train, lambda: model.requires_grad_(True), model.gradient_checkpointing_enable):
        change()
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all("lora_" in name and ".policy.weight" in name for name in trainable), trainable
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_policy_and_base_anchor_can_be_the_same_object():
    member = tiny_member("qwen2", 0)
    expected = logits(member)
    model = LogitMixForCausalLM.from_members(member, member, peft_config=lora(init_lora_weights=False))
    assert model.config.adapters["anchor_0"] == "off"
    assert torch.equal(logits(model, alpha=1.0), expected)
    assert (logits(model, alpha=0.0) - expected).abs().max() > 0.1


def test_a_model_in_memory_is_not_the_base_of_its_folder(folders):
    """Its weights may have changed since it was loaded."""
    policy = reference(folders["base"])
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)
    model = LogitMixForCausalLM.from_members(policy, folders["base"], peft_config=lora())
    assert len(model.anchors) == 1
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(folders["base"])))


def test_a_model_in_memory_shares_its_weights_with_an_adapter_on_its_folder(folders):
    policy = reference(folders["base"])
    model = LogitMixForCausalLM.from_members(policy, folders["anchor adapter"], peft_config=lora())
    assert model.anchors == []
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(folders["anchor adapter"])))


def test_an_anchors_adapter_is_merged_if_the_policy_has_none(folders):
    model = LogitMixForCausalLM.from_members(folders["base"], folders["anchor adapter"])
    assert model.config.adapters == {}
    assert type(model.anchor_0) is Qwen2ForCausalLM
    expected = logits(reference(folders["anchor adapter"]))
    torch.testing.assert_close(logits(model, alpha=1.0), expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in model.policy.parameters())


@pytest.mark.filterwarnings("error:Already found")
def test_three_members_of_one_base_beside_one_of_another(folders):
    model = LogitMixForCausalLM.from_members(
        folders["policy adapter"],
        [folders["base"], folders["anchor adapter"], folders["sft"]],
        weights=[0.4, 0.3, 0.2, 0.1],
    )
    sources = ("policy adapter", "base", "anchor adapter", "sft")
    expected = sum(w * logits(reference(folders[name])) for w, name in zip([0.4, 0.3, 0.2, 0.1], sources, strict=True))
    torch.testing.assert_close(logits(model), expected)
    assert [len(model.anchors), model.config.num_hidden_layers] == [1, 8]


def test_an_architecture_with_its_default_targets(tmp_path):
    """PEFT has default target modules for many architectures."""
    for architecture in ("gpt2", "gemma2", "llama", "mixtral"):
        member = tiny_member(architecture, 0)
        expected = logits(member)
        targets = ["q_proj"] if architecture == "mixtral" else None
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
        model = LogitMixForCausalLM.from_members(member, member, peft_config=config)
        assert torch.equal(logits(model, alpha=1.0), expected)
        assert not torch.equal(logits(model, alpha=0.0), expected)
        model.save_pretrained(tmp_path / architecture)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / architecture)
        for alpha in (0.0, 0.5, 1.0):
            assert torch.equal(logits(loaded, alpha=alpha), logits(model, alpha=alpha))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_for_the_policy_and_for_the_anchor(variant, folders, tmp_path):
    first = save_adapter(tmp_path / "first", folders["base"], 3, **VARIANTS[variant])
    for policy, anchor in ((first, folders["anchor adapter"]), (folders["anchor adapter"], first), (first, first)):
        model = LogitMixForCausalLM.from_members(policy, anchor)
        model.save_pretrained(tmp_path / "mixture")
        for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")):
            torch.testing.assert_close(logits(loaded, alpha=0.0), logits(reference(policy)))
            torch.testing.assert_close(logits(loaded, alpha=1.0), logits(reference(anchor)))
            names = {name for name, p in loaded.named_parameters() if p.requires_grad}
            assert names
            assert all(".policy" in name for name in names)


# --- running the members --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_generate_matches_the_mixture_of_merged_models(kind, scheme, folders):
    """With left padding, caches, one alpha per sequence, and beams."""
    model, merged = (build(kind, folders, scheme=scheme) for build in (mixture, merged_mixture))
    for kwargs in (
        {"alpha": 0.4},
        {"alpha": torch.tensor([0.0, 0.7])},
        {"alpha": torch.tensor([1.0, 0.5]), "num_beams": 3},
        {"alpha": 0.4, "do_sample": True, "temperature": 0.7, "top_k": 0},
        {"alpha": 0.4, "cache_implementation": "static"},
    ):
        results = []
        for each in (model, merged):
            torch.manual_seed(0)
            results.append(each.generate(**INPUT, **{"do_sample": False, "max_new_tokens": 10} | kwargs))
        assert torch.equal(*results), kwargs


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_only_the_policys_adapter(kind, folders):
    """For W = W_0 + s B A: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    model = mixture(kind, folders).train()
    actual = gradients(model)
    assert all(".policy.weight" in name for name in actual)
    merged = gradients(merged_mixture(kind, folders).train())
    layers = [name.removesuffix(".lora_A.policy.weight") for name in actual if "lora_A" in name]
    assert len(layers) == 6
    for layer in layers:
        module, gradient = model.get_submodule(layer), merged[f"{layer}.weight"]
        a, b, scale = module.lora_A["policy"].weight, module.lora_B["policy"].weight, module.scaling["policy"]
        torch.testing.assert_close(actual[f"{layer}.lora_B.policy.weight"], scale * gradient @ a.T)
        torch.testing.assert_close(actual[f"{layer}.lora_A.policy.weight"], scale * b.T @ gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing_does_not_change_the_gradients(kind, arguments, folders):
    """The backward pass reruns the layers with the policy's adapter, whichever member ran last."""
    model = mixture(kind, folders).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("kind", ["two adapters", "base anchor"])
def test_only_the_policy_has_dropout(kind, tmp_path):
    """In the adapter and in the shared model, and only in training mode."""
    tiny_member("llama", 0, attention_dropout=0.5).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", 1, lora_dropout=0.5)
    anchor = adapter if kind == "two adapters" else tmp_path / "base"
    model = LogitMixForCausalLM.from_members(adapter, anchor).train()
    assert torch.equal(logits(model, alpha=1.0), logits(model, alpha=1.0))
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(anchor)))
    assert not torch.equal(logits(model, alpha=0.0), logits(model, alpha=0.0))
    assert all(module.training for module in model.policy.modules())
    model.eval()
    assert torch.equal(logits(model, alpha=0.0), logits(model, alpha=0.0))


def test_the_policys_adapter_is_active_after_a_call_that_failed(folders):
    model = mixture("two adapters", folders)
    with pytest.raises(ValueError, match="has no embedding of a token"):
        model(input_ids=torch.tensor([[10**6]]), alpha=1.0)
    torch.testing.assert_close(logits(model.policy), logits(reference(folders["policy adapter"])))


def test_an_optimizer_step_changes_only_the_policys_adapter(folders):
    for kind in KINDS:
        model = mixture(kind, folders).train()
        before = copy.deepcopy(model.state_dict())
        anchor = logits(model, alpha=1.0)
        gradients(model)
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all(".policy.weight" in name for name in changed)
        assert torch.equal(logits(model, alpha=1.0), anchor)


def test_a_deep_copy_shares_nothing(folders):
    model = mixture("two adapters", folders)
    other = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(logits(other, alpha=0.0), logits(other, alpha=1.0))
    assert torch.equal(logits(model), before)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_anchors_adapter_without_effect_is_rejected(folders, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    get_peft_model(base, lora()).save_pretrained(tmp_path / "untrained")
    with pytest.raises(
        ValueError,
        match=r"adapter '.*untrained' does not change the base's logits.*pass a trained adapter, or the base",
    ):
        LogitMixForCausalLM.from_members(folders["base"], tmp_path / "untrained", peft_config=lora())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(bias="all"), "bias='all' trains the base's own biases"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' subtracts from the base's weights"),
        (LoraConfig(layer_replication=[(0, 2), (1, 2)]), "layer_replication changes the base's layers"),
        (LoraConfig(trainable_token_indices=[1, 2]), "trainable_token_indices changes the base's embeddings"),
        (LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "sets alora_invocation_tokens"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "of type .*IA3.*can only be a LoRA adapter"),
        (LoraConfig(target_parameters=["mlp.down_proj.weight"]), "sets target_parameters"),
        ({"r": 8}, "peft_config is a dict; pass a LoraConfig"),
        (LoraConfig(target_modules=["no_such_layer"]), "'no_such_layer' in target_modules is no module of"),
    ],
)
def test_unsupported_adapters_are_rejected_by_name(config, message, folders):
    with pytest.raises(ValueError, match=message):
        LogitMixForCausalLM.from_members(folders["base"], folders["sft"], peft_config=config)


@pytest.mark.parametrize("kwargs", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_adapters_on_tied_embeddings_are_rejected(kwargs):
    tied = tiny_member("qwen2", 0, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ties its embeddings to its head; leave them out of target_modules"):
        LogitMixForCausalLM.from_members(tied, tiny_member(seed=1), peft_config=lora(**kwargs))


def test_a_second_adapter_for_the_policy_is_rejected(folders):
    with pytest.raises(ValueError, match=r"policy '.*policy_adapter' is an adapter already"):
        LogitMixForCausalLM.from_members(folders["policy adapter"], folders["sft"], peft_config=lora())
    policy = AutoModelForCausalLM.from_pretrained(folders["policy adapter"])
    with pytest.raises(ValueError, match="the policy has a PEFT adapter already"):
        LogitMixForCausalLM.from_members(policy, folders["sft"], peft_config=lora())


def test_an_adapter_of_another_shape_or_a_missing_base_is_rejected(folders, tmp_path):
    path = tmp_path / "anchor_adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    tiny_member("qwen2", 0, num_hidden_layers=1).save_pretrained(tmp_path / "small")
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "small")}))
    with pytest.raises(ValueError, match=r"anchor_adapter' does not fit '.*small': 0 .* missing and 4 are unexpected"):
        LogitMixForCausalLM.from_members(tmp_path / "small", folders["anchor adapter"], peft_config=lora())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"base of the adapter '.*anchor_adapter', '.*gone', cannot be loaded"):
        LogitMixForCausalLM.from_members(folders["base"], folders["anchor adapter"], peft_config=lora())


def test_an_adapter_on_a_copy_of_the_policys_model_shares_its_base(tmp_path):
    base = tiny_member("qwen2", 0)
    base.save_pretrained(tmp_path / "base")
    made = LogitMixForCausalLM.from_members(
        str(tmp_path / "base"), str(tmp_path / "base"), peft_config=LoraConfig(r=2, init_lora_weights=False)
    )
    made.export_member("policy", tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    options = {"peft_config": LoraConfig(r=2)}
    shared = LogitMixForCausalLM.from_members(str(tmp_path / "copy"), str(tmp_path / "adapter"), **options)
    assert shared.anchors == []
    assert torch.equal(logits(shared, weights=[0, 1]), logits(made, weights=[1, 0]))
    tiny_member("qwen2", 5).save_pretrained(tmp_path / "copy")
    assert LogitMixForCausalLM.from_members(str(tmp_path / "copy"), str(tmp_path / "adapter"), **options).anchors
