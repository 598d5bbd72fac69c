"""Contracts with transformers: what mixtures read, set, override or otherwise assume of it."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from logitmix.mixture import transformers_patches as patches
from logitmix.mixture.cache import member_caches
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import lora
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has
from tests.helpers.members import INPUT, VOCAB_SIZE, character_tokenizer, tiny_config, tiny_member

PACKAGE = "transformers"


@pytest.mark.parametrize("kind", ["attn_implementation", "experts_implementation"])
def test_configurations_have_a_private_getter_of_each_implementation(kind):
    config = tiny_config()
    assert_has(PACKAGE, config, f"_{kind}")
    member = AutoModelForCausalLM.from_config(config, **{kind: "eager"})
    assert patches.get_implementation(member.config, kind) == "eager"


def test_a_fast_tokenizer_decodes_with_a_private_backend_that_can_be_replaced():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", "<b>"]})
    assert_has(PACKAGE, tokenizer, "_tokenizer", "extra_special_tokens")
    ids = tokenizer("<a>1<b>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1"
    patches.make_tokens_ordinary(tokenizer, ["<a>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<a>1"
    assert tokenizer.extra_special_tokens == ["<b>"]
    assert tokenizer("<a>1<b>")["input_ids"] == ids


def test_initialisation_skips_marked_modules():
    member = tiny_member()
    assert_has(PACKAGE, member, "_initialize_weights")
    assert_source_has(PACKAGE, PreTrainedModel._initialize_weights, "_is_hf_initialized")
    before = member.lm_head.weight.clone()
    for is_marked in (True, False):
        for module in member.modules():
            module._is_hf_initialized = False
        if is_marked:
            patches.mark_initialized(member.lm_head)
        member._initialize_weights(member.lm_head)
        assert torch.equal(member.lm_head.weight, before) is is_marked


def test_save_pretrained_saves_an_adapter_if_the_model_is_marked_as_having_one(tmp_path):
    assert_has(PACKAGE, PreTrainedModel, "_hf_peft_config_loaded")
    member = tiny_member()
    member.add_adapter(lora(), "policy")
    for loaded, file in ((True, "adapter_config.json"), (False, "config.json")):
        patches.mark_adapters_loaded(member, loaded)
        member.save_pretrained(tmp_path / file)
        assert (tmp_path / file / file).exists()


def test_models_declare_their_capabilities_in_these_attributes():
    assert_has(
        PACKAGE, PreTrainedModel, "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn",
        "_supports_attention_backend", "_can_compile_fullgraph", "_keep_in_fp32_modules_strict",
    )  # fmt: skip


def test_assisted_decoding_passes_model_kwargs_to_the_candidate_generator(model, monkeypatch):
    """By keyword, as the override takes them; the assistant's forward has no `weights`."""
    assert_parameters(
        PACKAGE, GenerationMixin._get_candidate_generator, "self", "generation_config", "input_ids", "inputs_tensor",
        "logits_processor", "model_kwargs", "assistant_model",
    )  # fmt: skip
    received = []
    original = GenerationMixin._get_candidate_generator

    def record(self, *args, model_kwargs, **kwargs):
        received.append(model_kwargs)
        return original(self, *args, model_kwargs=model_kwargs, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", record)
    prompt = torch.tensor([[5, 17, 9]])
    model.generate(prompt, max_new_tokens=2, do_sample=False, alpha=0.4, assistant_model=tiny_member(seed=5))
    assert len(received) == 1
    assert "attention_mask" in received[0]
    assert "weights" not in received[0]


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_generate_draws_tokens_with_the_method_that_the_mixture_overrides(model, monkeypatch, settings):
    """And with these arguments, everything else prepared."""
    assert_parameters(
        PACKAGE, GenerationMixin._sample, "self", "input_ids", "logits_processor", "stopping_criteria",
        "generation_config", "synced_gpus", "streamer", "model_kwargs",
    )  # fmt: skip
    received = {}
    monkeypatch.setattr(model, "decode_tokens", lambda *args, **kwargs: received.update(kwargs, ids=args[0]))
    model.generate(**INPUT, max_new_tokens=2, alpha=[0.2, 0.4], **settings)
    assert torch.equal(received["ids"], INPUT["input_ids"])
    assert received["generation_config"].max_length == INPUT["input_ids"].shape[1] + 2
    assert received["weights"].shape == (2, 2)
    assert type(received["past_key_values"]) is DynamicCache


def test_generate_validates_its_mode_with_the_method_that_the_mixture_overrides(model, monkeypatch):
    assert_parameters(
        PACKAGE, GenerationMixin._validate_generation_mode, "self", "generation_mode", "generation_config",
        "generation_mode_kwargs",
    )  # fmt: skip
    modes = []
    monkeypatch.setattr(model, "validate_generation_mode", modes.append)
    model.generate(**INPUT, max_new_tokens=1, do_sample=False, num_beams=2)
    assert [mode.value for mode in modes] == ["beam_search"]


def test_generate_sizes_its_cache_with_the_method_that_the_mixture_overrides(model):
    """A static cache is as long as the longest of the members' prompts."""
    assert_parameters(
        PACKAGE, GenerationMixin._prepare_cache_for_generation, "self", "generation_config", "model_kwargs",
        "generation_mode", "batch_size", "max_cache_length",
    )  # fmt: skip
    lengths = []
    for prompts in ({}, {"member_prompts": {"anchor": [3] * 9}}):
        output = model.generate(
            **INPUT, max_new_tokens=3, do_sample=False, cache_implementation="static", return_dict_in_generate=True,
            **prompts,
        )  # fmt: skip
        lengths.append(output.past_key_values.layers[-1].max_cache_len)
    assert lengths[1] - lengths[0] == 9 - INPUT["input_ids"].shape[1]


def test_generate_builds_masks_with_the_method_that_the_mixture_overrides(model, monkeypatch):
    """With a static cache. If `generate` no longer called it by this name, members would get a mask of the mixture."""
    masks = []

    def record(attention_mask, **kwargs):
        masks.append(attention_mask)
        return attention_mask

    monkeypatch.setattr(model, "create_masks_for_generate", record)
    model.generate(**INPUT, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert len(masks) == 3
    assert all(mask.dim() == 2 for mask in masks)


def test_generate_repeats_tensors_for_returned_sequences_but_not_lists(model):
    """So weights of a batch are passed as a list, and weights of each sequence as a tensor."""
    assert_has(PACKAGE, model, "_expand_inputs_for_generation")
    _, expanded = model._expand_inputs_for_generation(
        2, input_ids=torch.ones(2, 3), rows=torch.tensor([[1.0], [2.0]]), numbers=[0.5, 0.5]
    )
    assert expanded["rows"].tolist() == [[1.0], [1.0], [2.0], [2.0]]
    assert expanded["numbers"] == [0.5, 0.5]


def test_views_of_a_cache_share_its_layers(model):
    """`member_caches` relies on `Cache(layers=...)` keeping the layers that it is given."""
    cache = DynamicCache(config=model.config)
    views = member_caches(cache, model.config.cache_layers)
    assert [len(view.layers) for view in views] == [2, 3]
    layers = [layer for view in views for layer in view.layers]
    assert all(layer is shared for layer, shared in zip(layers, cache.layers, strict=True))
    key = torch.randn(1, 1, 4, 12)
    views[1].update(key, key, layer_idx=0)
    assert torch.equal(cache.layers[2].keys, key)
    assert (views[0].get_seq_length(), views[1].get_seq_length()) == (0, 4)


def test_a_cache_built_from_the_configuration_has_the_layers_of_every_member():
    """`generate` reads the number and kinds of layers from the mixture's configuration."""
    members = [tiny_member(name, seed) for seed, name in enumerate(("qwen2-sliding", "llama", "gemma2"))]
    model = LogitMixForCausalLM.from_members(members[0], members[1:], weights=[0.5, 0.3, 0.2])
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    expected = [layer for member in members for layer in DynamicCache(config=member.config).layers]
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in expected]
    assert [getattr(x, "sliding_window", None) for x in cache.layers] == [
        getattr(x, "sliding_window", None) for x in expected
    ]
    assert isinstance(cache, Cache)
    assert model.config.num_hidden_layers == len(expected)
    assert model.config.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("architecture", ["mixtral", "gemma2"])
def test_a_members_weights_have_the_names_that_the_mixture_saves(tmp_path, architecture):
    """One architecture has its experts joined on loading, the other has tied weights."""
    anchor = tiny_member(architecture, 1)
    anchor.save_pretrained(tmp_path / "anchor")
    mixture = LogitMixForCausalLM.from_members(tiny_member("qwen2"), tmp_path / "anchor")
    mixture.save_pretrained(tmp_path / "mixture")
    saved = load_file(tmp_path / "mixture" / "model.safetensors")
    found = {f"anchor_0.{name}": weight for name, weight in patches.saved_state_dict(mixture.anchor_0).items()}
    assert found.keys() == {name for name in saved if name.startswith("anchor_0.")}
    assert all(torch.equal(weight, saved[name]) for name, weight in found.items())
