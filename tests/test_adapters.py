"""Members as LoRA adapters: (a) on a policy beside a full anchor, (b) two on one base, (c) beside the base itself."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from members import PAD, character_tokenizer, tiny_member
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from logitmix.modeling import LogitMixForCausalLM

INPUT = {
    "input_ids": torch.tensor([[PAD, PAD, 5, 17, 9], [12, 50, 7, 33, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
KINDS = ["full anchor", "two adapters", "base anchor"]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**INPUT, **kwargs).logits


def lora(**kwargs):
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | kwargs
    )


def save_adapter(path, base, seed, **kwargs):
    """An adapter folder as PEFT leaves it, its weights drawn from `seed`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora(init_lora_weights=False, **kwargs))
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(path)
    return str(path)


@pytest.fixture
def folders(tmp_path):
    """Two full models with their tokenizer, and two adapters on the first of them."""
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed).save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
    base = str(tmp_path / "base")
    return {
        "base": base,
        "sft": str(tmp_path / "sft"),
        "policy adapter": save_adapter(tmp_path / "policy_adapter", base, 1),
        "anchor adapter": save_adapter(tmp_path / "anchor_adapter", base, 2, r=6, target_modules=["k_proj", "v_proj"]),
    }


def anchor_of(kind, folders):
    return folders[{"full anchor": "sft", "two adapters": "anchor adapter", "base anchor": "base"}[kind]]


def mixture(kind, folders, **kwargs):
    """A mixture whose policy is a trained adapter."""
    return LogitMixForCausalLM.from_members(
        folders["policy adapter"], anchor_of(kind, folders), **{"alpha": 0.3} | kwargs
    )


def reference(source):
    """The member as transformers loads it, or PEFT where it is an adapter."""
    path = Path(source) / "adapter_config.json"
    if not path.exists():
        return AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(json.loads(path.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, source).eval()


def merged_mixture(kind, folders, **kwargs):
    """The same mixture of two full models."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    policy = PeftModel.from_pretrained(base, folders["policy adapter"]).merge_and_unload()
    anchor = AutoModelForCausalLM.from_pretrained(folders["sft" if kind == "full anchor" else "base"])
    if kind == "two adapters":
        anchor = PeftModel.from_pretrained(anchor, folders["anchor adapter"]).merge_and_unload()
    policy.requires_grad_(True)
    return LogitMixForCausalLM.from_members(policy.eval(), anchor.eval(), **{"alpha": 0.3} | kwargs)


# --- what the members are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_has_the_logits_that_transformers_and_peft_give_it(kind, folders):
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
def test_the_base_is_held_once_where_it_can_be(kind, held, folders):
    model = mixture(kind, folders)
    size = sum(p.numel() for p in reference(folders["base"]).parameters())
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(p.numel() for p in model.parameters()) == held * size + adapters
    assert model.weight_bytes() == (4 * (held * size + adapters), 4 * (2 - held) * size)
    assert len(model.anchors) == held - 1
    assert len(model.members) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_starts_as_the_base_and_is_all_that_trains(kind, folders):
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


def test_the_policy_and_its_base_may_be_one_model_in_memory():
    member = tiny_member("qwen2", 0)
    expected = logits(member)
    model = LogitMixForCausalLM.from_members(member, member, peft_config=lora(init_lora_weights=False))
    assert model.config.adapters["anchor_0"] == "off"
    assert torch.equal(logits(model, alpha=1.0), expected)
    assert (logits(model, alpha=0.0) - expected).abs().max() > 0.1


def test_a_model_in_memory_does_not_share_the_folder_that_it_came_from(folders):
    """Its weights may be others by now."""
    policy = reference(folders["base"])
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)
    model = LogitMixForCausalLM.from_members(policy, folders["base"], peft_config=lora())
    assert len(model.anchors) == 1
    torch.testing.assert_close(logits(model, alpha=1.0), logits(reference(folders["base"])))


def test_an_adapter_beside_a_policy_of_full_weights_is_merged_into_a_model_of_its_own(folders):
    model = LogitMixForCausalLM.from_members(folders["base"], folders["anchor adapter"])
    assert model.config.adapters == {}
    assert type(model.anchor_0) is Qwen2ForCausalLM
    expected = logits(reference(folders["anchor adapter"]))
    torch.testing.assert_close(logits(model, alpha=1.0), expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in model.policy.parameters())


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
    """PEFT knows which layers of an architecture to adapt where the configuration names none."""
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


VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "rank_pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


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


# --- running them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_generation_is_that_of_the_same_mixture_of_full_models(kind, scheme, folders):
    """With left padding, a cache of each member's own layers, an alpha for each sequence, and beams."""
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


def gradients(model, **kwargs):
    model.zero_grad()
    model(**INPUT, labels=INPUT["input_ids"], **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_policys_adapter_alone_and_are_those_of_the_merged_weights(kind, folders):
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
    """The backward pass runs the layers again: with the policy's adapter, whichever member ran last."""
    model = mixture(kind, folders).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("kind", ["two adapters", "base anchor"])
def test_dropout_is_the_policys_alone(kind, tmp_path):
    """Of the adapter and of the shared model, and in training only."""
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
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]), alpha=1.0)
    torch.testing.assert_close(logits(model.policy), logits(reference(folders["policy adapter"])))


def test_an_optimizer_step_changes_the_policy_and_no_bit_of_the_anchor(folders):
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


# --- one head product -----------------------------------------------------------------------------------------------


def head_calls(model):
    """The list that grows by a shape with each product with the policy's head."""
    calls = []
    model.policy.get_output_embeddings().register_forward_hook(lambda module, args, output: calls.append(output.shape))
    return calls


def shared_head_pair(architecture, weights, **kwargs):
    """In float64, with the base anchor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**SMALL | kwargs)
        member = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        with torch.no_grad():
            for name, parameter in member.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = LogitMixForCausalLM.from_members(member, member, weights=weights, peft_config=adapter)
    model(**INPUT)  # the head is measured once
    return model


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.25], torch.tensor([[0.7, 0.3], [1.0, 0.0]])], ids=str)
@pytest.mark.parametrize(
    ("architecture", "kwargs", "products"),
    [
        ("Qwen2", {}, 1),
        ("Qwen2", {"tie_word_embeddings": True}, 1),
        ("Phi", {}, 1),  # a bias
        ("Granite", {"logits_scaling": 8.0}, 1),
        ("Cohere", {"logit_scale": 0.0625}, 1),
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16}, 2),  # not linear
        ("Gemma2", {"final_logit_softcapping": None, "head_dim": 16}, 1),
    ],
)
def test_a_shared_head_multiplies_once_and_gives_the_mixture_of_the_logits(architecture, kwargs, products, weights):
    model = shared_head_pair(architecture, [0.5, 0.5], **kwargs)
    calls = head_calls(model)
    actual = logits(model, weights=weights)
    assert len(calls) == products
    members = [logits(model, weights=one) for one in ([1.0, 0.0], [0.0, 1.0])]
    rows = torch.as_tensor(weights, dtype=torch.float64).expand(2, 2)
    expected = sum(rows[:, k, None, None] * members[k] for k in (0, 1))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert (members[0] - members[1]).abs().max() > 0.01


def test_a_shared_head_multiplies_only_the_positions_that_are_kept(folders):
    model = mixture("two adapters", folders)
    full = logits(model)
    calls = head_calls(model)
    torch.testing.assert_close(logits(model, logits_to_keep=2), full[:, -2:])
    torch.testing.assert_close(logits(model, logits_to_keep=torch.tensor([1, 3])), full[:, [1, 3]])
    model.generate(**INPUT, max_new_tokens=3, do_sample=False, alpha=0.4)
    assert [shape[1] for shape in calls] == [2, 2, 1, 1, 1]


def test_heads_that_are_not_the_same_or_not_mixed_in_the_logits_multiply_each(folders, tmp_path):
    with_head = save_adapter(tmp_path / "head", folders["base"], 3, target_modules=["q_proj", "lm_head"])
    for model in (
        mixture("two adapters", folders, scheme="prob"),
        LogitMixForCausalLM.from_members(folders["policy adapter"], with_head),
        LogitMixForCausalLM.from_members(with_head, folders["base"]),
    ):
        before = logits(model)
        calls = head_calls(model)
        assert torch.equal(logits(model), before)
        assert len(calls) == 2
    one = mixture("full anchor", folders)
    calls = head_calls(one)
    logits(one)
    assert len(calls) == 1, "the anchor has a head of its own"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_with_a_shared_head_is_of_the_distribution_that_forward_gives(folders, temperature):
    model = mixture("two adapters", folders)
    log_probs, entropy = model.score(**INPUT, labels=INPUT["input_ids"], temperature=temperature)
    diagnosed = model.score_and_diagnose(**INPUT, labels=INPUT["input_ids"], temperature=temperature)
    assert torch.equal(diagnosed[0], log_probs), "a ratio of the two is exactly 1"
    assert log_probs.requires_grad
    expected = (model(**INPUT).logits[:, :-1] / temperature).log_softmax(-1)
    picked = expected.gather(-1, INPUT["input_ids"][:, 1:, None]).squeeze(-1)
    real = INPUT["attention_mask"][:, :-1] == 1
    torch.testing.assert_close(log_probs[real], picked[real])
    torch.testing.assert_close(entropy[real], -(expected.exp() * expected).sum(-1)[real])


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_mixture_comes_back_bit_for_bit_and_holds_the_base_once(kind, tied, tmp_path):
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    folders = {"base": str(tmp_path / "base"), "sft": str(tmp_path / "sft")}
    for seed, name in enumerate(["policy adapter", "anchor adapter"]):
        folders[name] = save_adapter(tmp_path / name, folders["base"], seed)
    model = mixture(kind, folders)
    model.save_pretrained(tmp_path / "mixture")
    loaded, info = LogitMixForCausalLM.from_pretrained(tmp_path / "mixture", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.adapters == model.config.adapters
    for alpha in (0.0, 0.3, 1.0):
        assert torch.equal(logits(loaded, alpha=alpha), logits(model, alpha=alpha))
    with safe_open(tmp_path / "mixture" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum("embed_tokens" in name for name in names) == (2 if kind == "full anchor" else 1)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    for member in loaded.members:
        assert (member.lm_head.weight is member.get_input_embeddings().weight) is tied
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_adapters_are_float32_beside_a_base_in_half_precision_and_stay_so(tmp_path):
    """As PEFT trains them: a step of 1e-5 is lost in bfloat16."""
    tiny_member("qwen2", 0).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", 1)
    model = LogitMixForCausalLM.from_members(adapter, tmp_path / "base", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "mixture")
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")):
        for name, parameter in each.named_parameters():
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert torch.equal(logits(each), logits(model))
    with safe_open(adapter + "/adapter_model.safetensors", "pt") as file:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        loaded = model.policy.get_parameter("model.layers.0.self_attn.q_proj.lora_A.policy.weight")
        assert torch.equal(file.get_tensor(name), loaded)


def test_a_checkpoint_without_adapters_from_before_them_still_loads(tmp_path):
    model = LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["adapters"]
    path.write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# --- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", [False, True])
def test_an_exported_member_loads_in_transformers_alone(kind, merge, folders, tmp_path):
    mixture(kind, folders).save_pretrained(tmp_path / "mixture")
    model = LogitMixForCausalLM.from_pretrained(tmp_path / "mixture")
    before = copy.deepcopy(model.state_dict())
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        folder = tmp_path / name
        model.export_member(name, folder, merge=merge)
        is_adapter = (folder / "adapter_config.json").exists()
        assert is_adapter == (not merge and model.config.adapters.get(name, "off") != "off")
        assert is_adapter != (folder / "config.json").exists()
        exported = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(exported), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == character_tokenizer().get_vocab()
        if is_adapter:
            torch.testing.assert_close(logits(reference(folder)), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_export(variant, folders, tmp_path):
    """(transformers 5.19 loses the magnitudes of an unmerged DoRA adapter; PEFT reads it.)"""
    first = save_adapter(tmp_path / "first", folders["base"], 3, **VARIANTS[variant])
    model = LogitMixForCausalLM.from_members(folders["anchor adapter"], first)
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        for merge in (False, True):
            folder = tmp_path / f"{name}_{merge}"
            model.export_member(name, folder, merge=merge)
            torch.testing.assert_close(logits(reference(folder)), logits(model, alpha=alpha), atol=1e-5, rtol=1e-5)


def test_an_exported_policy_is_an_anchor_of_the_next_run(folders, tmp_path):
    model = mixture("two adapters", folders)
    model.export_member("policy", tmp_path / "policy")
    following = LogitMixForCausalLM.from_members(folders["base"], tmp_path / "policy", peft_config=lora())
    assert len(following.anchors) == 0
    torch.testing.assert_close(logits(following, alpha=1.0), logits(model, alpha=0.0))


def test_save_pretrained_of_the_policy_is_its_adapter(folders, tmp_path):
    model = mixture("two adapters", folders)
    model.policy.save_pretrained(tmp_path / "policy")
    torch.testing.assert_close(logits(reference(tmp_path / "policy")), logits(model, alpha=0.0))


def test_members_without_adapters_export_too(tmp_path):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("llama", 1))
    for name, alpha in (("policy", 0.0), ("anchor_0", 1.0)):
        model.export_member(name, tmp_path / name)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model, alpha=alpha))


def test_exports_that_cannot_be_are_refused(tmp_path):
    member = tiny_member("qwen2", 0)
    model = LogitMixForCausalLM.from_members(member, member, peft_config=lora())
    with pytest.raises(ValueError, match="there is no member 'anchor_1'; the members are policy, anchor_0"):
        model.export_member("anchor_1", tmp_path)
    with pytest.raises(ValueError, match=r"model that was given from memory.*export it merged"):
        model.export_member("policy", tmp_path)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_anchors_adapter_that_changes_nothing_is_refused(folders, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    get_peft_model(base, lora()).save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"adapter '.*untrained' changes nothing.*Give the trained one, or the base"):
        LogitMixForCausalLM.from_members(folders["base"], tmp_path / "untrained", peft_config=lora())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(bias="all"), "bias='all' trains the base's own biases"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa' takes a part out of the base's weights"),
        (LoraConfig(layer_replication=[(0, 2), (1, 2)]), "layer_replication changes the base's layers"),
        (LoraConfig(trainable_token_indices=[1, 2]), "trainable_token_indices changes the base's embeddings"),
        (LoraConfig(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "alora_invocation_tokens set"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "of type .*IA3.*can be LoRA adapters only"),
        (LoraConfig(target_parameters=["mlp.down_proj.weight"]), "target_parameters set"),
        ({"r": 8}, "peft_config is a dict; give a LoraConfig"),
        (LoraConfig(target_modules=["no_such_layer"]), "adapter of policy does not fit.*no_such_layer"),
    ],
)
def test_what_a_mixture_cannot_hold_is_refused_by_name(config, message, folders):
    with pytest.raises(ValueError, match=message):
        LogitMixForCausalLM.from_members(folders["base"], folders["sft"], peft_config=config)


@pytest.mark.parametrize("kwargs", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_tied_embeddings_and_heads_cannot_be_adapted(kwargs):
    tied = tiny_member("qwen2", 0, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ties its embeddings to its head; leave them out of target_modules"):
        LogitMixForCausalLM.from_members(tied, tiny_member(seed=1), peft_config=lora(**kwargs))


def test_a_policy_that_is_an_adapter_takes_no_new_one(folders):
    with pytest.raises(ValueError, match=r"policy '.*policy_adapter' is an adapter already"):
        LogitMixForCausalLM.from_members(folders["policy adapter"], folders["sft"], peft_config=lora())
    policy = AutoModelForCausalLM.from_pretrained(folders["policy adapter"])
    with pytest.raises(ValueError, match="the policy has an adapter of PEFT already"):
        LogitMixForCausalLM.from_members(policy, folders["sft"], peft_config=lora())


def test_an_adapter_of_another_shape_or_of_a_missing_base_is_refused(folders, tmp_path):
    path = tmp_path / "anchor_adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    tiny_member("qwen2", 0, num_hidden_layers=1).save_pretrained(tmp_path / "small")
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "small")}))
    with pytest.raises(ValueError, match=r"anchor_adapter' does not fit '.*small': 0 .* missing and 4 have no place"):
        LogitMixForCausalLM.from_members(tmp_path / "small", folders["anchor adapter"], peft_config=lora())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"adapter '.*anchor_adapter' was made on '.*gone'"):
        LogitMixForCausalLM.from_members(folders["base"], folders["anchor adapter"], peft_config=lora())
