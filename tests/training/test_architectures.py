"""Every causal architecture of the installed transformers works in a mixture, or is refused when it is built.

docs/architectures.md is the table of the outcomes; `python -m tests.helpers.architecture_sweep` writes it.
"""

import pytest
import torch

from logitmix import LogitMixForCausalLM
from tests.helpers.architecture_sweep import PAGE, assert_same_tensors, outcome, page, row
from tests.helpers.architectures import MODEL_TYPES, tiny_causal_model
from tests.helpers.members import tiny_member

# Those that `make test` tries; together the others take minutes
_QUICK = {"bart", "falcon_h1", "gemma4_text", "llama", "mamba", "minimax", "qwen3", "qwen3_moe", "recurrent_gemma"}


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.sweep]) for name in MODEL_TYPES],
)
def test_the_page_says_what_a_mixture_of_each_architecture_does(model_type):
    assert row(model_type, outcome(model_type)) in PAGE.read_text().splitlines()


def test_the_page_is_the_one_that_the_sweep_writes():
    rows = [line.split("|", 2) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    results = {name.strip(" `"): result.strip(" |") for _, name, result in rows}
    assert list(results) == MODEL_TYPES
    assert page(results) == PAGE.read_text()


def test_a_refusal_is_one_short_sentence():
    for line in PAGE.read_text().splitlines():
        if "| refused: " in line:
            assert len(line) < 500, line
            assert "Traceback" not in line


def test_buffers_that_a_container_fills_are_those_of_the_member(tmp_path):
    """Falcon-H1's model fills the `mup_vector` of its layers, and has no weights of its own."""
    model = LogitMixForCausalLM.from_members(tiny_causal_model("falcon_h1"), tiny_causal_model("falcon_h1", 1))
    model.save_pretrained(tmp_path)
    junk = [torch.full((size,), torch.nan) for size in (8, 64, 256, 1024)] * 8  # for torch.empty to find
    del junk
    assert any("mup_vector" in name for name, _ in model.named_buffers())
    assert_same_tensors(LogitMixForCausalLM.from_pretrained(tmp_path), model)


def test_gemma_4_with_layers_of_different_head_sizes_is_saved_and_loaded(tmp_path):
    policy = tiny_causal_model("gemma4_text")
    model = LogitMixForCausalLM.from_members(policy, tiny_member("qwen2", 1))
    assert not hasattr(model.config, "head_dim")
    model.save_pretrained(tmp_path)
    assert_same_tensors(LogitMixForCausalLM.from_pretrained(tmp_path), model)


def test_a_model_that_a_saved_mixture_could_not_load_is_refused():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    member = Qwen2_5_VLForConditionalGeneration(config).eval()
    for members in ((member, tiny_member()), (tiny_member(), member)):
        with pytest.raises(
            ValueError, match=r"the Qwen2_5_VLForConditionalGeneration cannot be a member .*Qwen2_5_VL"
        ):
            LogitMixForCausalLM.from_members(*members)


def test_an_encoder_is_refused_unless_it_is_made_a_decoder():
    members = [tiny_causal_model("bert", seed) for seed in (0, 1)]
    LogitMixForCausalLM.from_members(*members)
    for member in members:
        for module in member.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        member.config.is_decoder = False
    with pytest.raises(ValueError, match=r"depend on later tokens.*is_decoder=True"):
        LogitMixForCausalLM.from_members(*members)


def test_the_checks_of_a_member_draw_no_random_numbers_and_keep_its_mode():
    policy, anchor = tiny_member("gpt2", 0).train(), tiny_member("gpt2", 1)
    state = torch.get_rng_state()
    model = LogitMixForCausalLM.from_members(policy, anchor)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.policy.training
