"""Building a mixture from members: their tokenizers, vocabularies and sources."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from logitmix.mixture.loading import OTHER_TOKENIZERS
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.presets import contrastive_decoding
from tests.helpers.members import (
    INPUT,
    PAD,
    VOCAB_SIZE,
    character_tokenizer,
    logits,
    tiny_member,
)
from tests.helpers.paths import ROOT


def test_the_tokenizer_and_generation_config_of_folders_are_kept(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}="
    for seed, name in enumerate(["base", "sft"]):
        member = tiny_member("qwen2", seed)
        member.generation_config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=2, pad_token_id=PAD)
        member.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(str(tmp_path / "base"), str(tmp_path / "sft"), alpha=0.3)
    model.save_pretrained(tmp_path / "mixture")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    back = AutoTokenizer.from_pretrained(tmp_path / "mixture")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.temperature == 0.3
    assert loaded.generation_config.eos_token_id == 2
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.chat_template == tokenizer.chat_template
    loaded.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_members_can_be_paths(tmp_path):
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed).save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(tmp_path / "base", [tmp_path / "sft"])
    assert torch.equal(logits(model, alpha=1.0), logits(tiny_member("qwen2", 1)))


def test_the_generation_config_is_a_copy(model, pair):
    model.generation_config.temperature = 0.123
    assert pair[0].generation_config.temperature != 0.123


def test_vocabularies_that_differ_in_padding_rows_mix_over_the_shared_tokens(tmp_path):
    """Qwen2.5 has 151,936 rows at 1.5B and 3B, but 152,064 at 7B."""
    members = [tiny_member("qwen2", 0), tiny_member("llama", 1, vocab_size=VOCAB_SIZE + 7)]
    tokenizer = character_tokenizer()
    for member, name in zip(members, ["base", "sft"], strict=True):
        member.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = LogitMixForCausalLM.from_members(str(tmp_path / "base"), str(tmp_path / "sft"), alpha=0.3)
    assert model.config.vocab_size == VOCAB_SIZE
    expected = 0.7 * logits(members[0]) + 0.3 * logits(members[1])[..., :VOCAB_SIZE]
    torch.testing.assert_close(logits(model), expected)
    assert logits(model, alpha=1.0).shape[-1] == VOCAB_SIZE
    generated = model.generate(**INPUT, max_new_tokens=20, do_sample=True, top_k=0, alpha=1.0)
    assert generated.max() < VOCAB_SIZE


def save_with_tokenizer(path, characters, **kwargs):
    tiny_member("qwen2", 0, **kwargs).save_pretrained(path)
    character_tokenizer(characters).save_pretrained(path)
    return str(path)


def test_the_error_for_different_tokenizers_names_the_first_difference(tmp_path):
    base = save_with_tokenizer(tmp_path / "base", "abcd")
    with pytest.raises(ValueError, match=r"token 5 is 'c' in '.*base' and 'x' in '.*sft'"):
        LogitMixForCausalLM.from_members(base, save_with_tokenizer(tmp_path / "sft", "abxd"))
    with pytest.raises(ValueError, match=r"token 7 is missing in '.*base' and 'e' in '.*longer'"):
        LogitMixForCausalLM.from_members(base, save_with_tokenizer(tmp_path / "longer", "abcde"))


def test_the_error_for_different_tokenizers_names_the_page_of_ways_out(tmp_path):
    page, _, anchor = OTHER_TOKENIZERS.partition("#")
    titles = [line.strip("# ").lower() for line in (ROOT / page).read_text().splitlines() if line.startswith("#")]
    assert anchor.replace("-", " ") in titles
    with pytest.raises(ValueError, match=OTHER_TOKENIZERS):
        contrastive_decoding(save_with_tokenizer(tmp_path / "a", "abcd"), save_with_tokenizer(tmp_path / "b", "abcde"))


def test_a_vocabulary_that_has_added_tokens_is_cut_to_the_shared_prefix(tmp_path):
    policy, anchor = save_with_tokenizer(tmp_path / "a", "abcd"), save_with_tokenizer(tmp_path / "b", "abcde")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(anchor)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    assert LogitMixForCausalLM.from_members(policy, tmp_path / "cut").config.vocab_size == len(tokenizer)


def test_a_vocabulary_smaller_than_the_tokenizers_is_rejected(tmp_path):
    base = save_with_tokenizer(tmp_path / "base", "abcd")
    small = save_with_tokenizer(tmp_path / "small", "abcd", vocab_size=6)
    with pytest.raises(ValueError, match="the tokenizer has 7 tokens, but a member has logits for only 6"):
        LogitMixForCausalLM.from_members(base, small)


def test_a_member_that_does_not_exist_is_rejected(pair, tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no model at '.*missing'"):
        LogitMixForCausalLM.from_members(pair[0], missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no model at '.*empty': the folder has no config.json"):
        LogitMixForCausalLM.from_members(pair[0], str(tmp_path / "empty"))


def test_the_same_model_object_for_two_anchors_is_rejected(pair):
    with pytest.raises(ValueError, match=r"same model object is given twice among the anchors.*deepcopy"):
        LogitMixForCausalLM.from_members(pair[0], [pair[1], pair[1]], weights=[0.5, 0.25, 0.25])


def test_a_mixture_as_a_member_is_rejected(model, pair):
    with pytest.raises(ValueError, match="a member is itself a mixture"):
        LogitMixForCausalLM.from_members(model, pair[1])


def test_a_mixture_without_anchors_is_rejected(pair):
    with pytest.raises(ValueError, match="needs at least one anchor"):
        LogitMixForCausalLM.from_members(pair[0], [])


def test_a_model_wrapped_by_peft_is_rejected_as_a_member(pair):
    wrapped = get_peft_model(pair[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got PeftModel; to train a new adapter pass the plain model"):
        LogitMixForCausalLM.from_members(wrapped, pair[1])
