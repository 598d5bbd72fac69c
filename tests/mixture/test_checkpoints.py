"""Saving and loading mixtures."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.frozen import references
from logitmix.mixture.frozen.store import frozen_names, save_store
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import (
    ARCHITECTURES,
    INPUT,
    VOCAB_SIZE,
    is_frozen,
    logits,
    tiny_member,
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_a_mixture_is_restored_bit_for_bit(tmp_path, scheme, tied):
    members = [tiny_member(a, i, tie_word_embeddings=tied) for i, a in enumerate(["qwen2", "llama", "qwen2"])]
    model = LogitMixForCausalLM.from_members(members[0], members[1:], weights=[0.5, 0.3, 0.2], scheme=scheme)
    model.save_pretrained(tmp_path)
    loaded, info = LogitMixForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for back in (loaded, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(back), logits(model))
        assert (back.config.weights, back.config.scheme) == (model.config.weights, scheme)
        assert [type(member) for member in back.members] == [type(member) for member in members]
        for member in back.members:
            assert (member.lm_head.weight is member.get_input_embeddings().weight) is tied
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))


def test_one_member_may_tie_its_embeddings_and_the_other_not(tmp_path):
    model = LogitMixForCausalLM.from_members(
        tiny_member("qwen2", 0), tiny_member("qwen2", 1, tie_word_embeddings=True)
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_anchor_of_every_architecture_is_restored_bit_for_bit(tmp_path, architecture):
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member(architecture, 1))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_sharded_checkpoint_is_restored_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_bfloat16_is_restored_as_bfloat16(tmp_path):
    model = LogitMixForCausalLM.from_members(*(tiny_member("qwen2", s, dtype=torch.bfloat16) for s in (0, 1)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


def test_a_checkpoint_loads_in_the_requested_dtype(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name).bfloat16())


def test_members_of_different_dtypes_load_in_their_own(tmp_path):
    policy, anchor = tiny_member("qwen2", 0), tiny_member("llama", 1, dtype=torch.bfloat16)
    model = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.3)
    torch.testing.assert_close(logits(model), 0.7 * logits(policy) + 0.3 * logits(anchor).float())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [member.dtype for member in loaded.members] == [torch.float32, torch.bfloat16]
    assert torch.equal(logits(loaded), logits(model))


def test_checkpoint_loads_with_a_device_map_and_an_attention_implementation(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager")
    assert [member.config._attn_implementation for member in loaded.members] == ["eager", "eager"]
    real = INPUT["attention_mask"] == 1  # padding tokens attend differently in each implementation
    torch.testing.assert_close(logits(loaded)[real], logits(model)[real])
    assert is_frozen(loaded)


def test_alpha_can_be_set_when_loading(tmp_path):
    LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1), alpha=0.5).save_pretrained(tmp_path)
    assert LogitMixForCausalLM.from_pretrained(tmp_path, alpha=0.2).alpha == 0.2
    assert LogitMixForCausalLM.from_pretrained(tmp_path).alpha == 0.5


def test_setting_alpha_changes_the_default_and_is_saved(model, pair, tmp_path):
    model.alpha = 0.9
    torch.testing.assert_close(logits(model), 0.1 * logits(pair[0]) + 0.9 * logits(pair[1]))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).alpha == 0.9
    with pytest.raises(ValueError, match="not finite"):
        model.alpha = float("nan")
    with pytest.raises(ValueError, match="default weights of a mixture are 2 numbers"):
        model.alpha = [0.2, 0.5]
    assert model.alpha == 0.9


def test_the_policy_saves_as_an_ordinary_checkpoint(model, pair, tmp_path):
    model.policy.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(exported) is Qwen2ForCausalLM
    assert torch.equal(logits(exported), logits(pair[0]))
    assert torch.equal(logits(exported), logits(model, alpha=0.0))


def test_configuration_survives_json_pickle_and_copy(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "logitmix"
    assert saved["members"] == ["policy", "anchor_0"]
    for config in (
        AutoConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model.config)),
        copy.deepcopy(model.config),
    ):
        assert isinstance(config, LogitMixConfig)
        assert config.weights == model.config.weights
        assert [type(c) for c in config.member_configs] == [type(c) for c in model.config.member_configs]
        assert config.num_hidden_layers == 5
        assert (config.vocab_size, config.get_text_config().vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)


def test_parameter_names_have_no_integer_before_that_of_the_layer(model):
    """vLLM reads the only integer of a weight's path as its layer."""
    assert all(sum(part.isdigit() for part in name.split(".")) <= 1 for name in model.state_dict())


def test_a_checkpoint_of_a_newer_format_is_rejected(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format version 99.*install a newer logitmix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_saving_a_member_with_an_unknown_adapter_is_rejected(model, pair, tmp_path):
    model.policy.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT adapter 'default' that the mixture does not know; merge it"):
        model.save_pretrained(tmp_path)


def test_frozen_weights_are_read_once_to_be_stored(model, tmp_path, monkeypatch):
    read = []
    digest = references._digest
    monkeypatch.setattr(references, "_digest", lambda weight: read.append(weight) or digest(weight))
    store = save_store(model, tmp_path, tmp_path / "staging")
    assert len(read) == len(set(read)) == len(frozen_names(model))
    assert store["sha256"].keys() == {"anchor_0"}
