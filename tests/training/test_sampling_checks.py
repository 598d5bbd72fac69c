"""No accepted configuration samples rollouts from another distribution than the one that is scored."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import FalconConfig, GenerationConfig, GPTNeoConfig, MixtralConfig, OPTConfig
from transformers.models.auto import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.sampling_checks import ENDS
from tests.helpers.grpo import mixture, sampled, trainer_of
from tests.helpers.members import PAD, VOCAB_SIZE, tiny_member

COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RANDOM = {  # models whose training mode is random in ways that TRL's `disable_dropout` does not reach
    "attention": lambda: tiny_member("qwen2", attention_dropout=0.5),
    "configuration read in each pass": lambda: _model(
        FalconConfig(**SIZES, attention_dropout=0.5, hidden_dropout=0.5, **COMMON)
    ),
    "attention by type": lambda: _model(
        GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            attention_dropout=0.5, embed_dropout=0.5, resid_dropout=0.5, **COMMON,
        )
    ),
    "dropped layers": lambda: _model(
        OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, **COMMON)
    ),
    "router noise": lambda: _model(
        MixtralConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=3, num_experts_per_tok=2, router_jitter_noise=0.5, **COMMON,
        )
    ),
}  # fmt: skip


def _model(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def difference(trainer):
    """The largest difference of sampled and scored log-probabilities, in training mode."""
    trainer.model.train()
    ids, mask, length, log_probs = sampled(trainer)
    with torch.no_grad():
        scored, _, _ = trainer.score_tokens(trainer.model, ids, mask, length)
    return (scored - log_probs).abs().max().item()


@pytest.mark.parametrize("name", RANDOM)
def test_training_mode_is_not_random(tmp_path, name):
    member = RANDOM[name]()
    before = member.config.to_dict()
    model = LogitMixForCausalLM.from_members(member, tiny_member("llama", seed=1), alpha=0.3)
    assert difference(trainer_of(tmp_path, model)) < 1e-4
    assert model.policy.config.to_dict() == before, "the saved configuration keeps its rates"


def test_training_mode_of_a_single_model_is_not_random(tmp_path):
    assert difference(trainer_of(tmp_path, tiny_member("llama", attention_dropout=0.5))) < 1e-4


MOVED = {
    "temperature": 0.0,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "neftune_noise_alpha": 5.0,
    "cache_implementation": "quantized",
}


@pytest.mark.parametrize("option", MOVED)
@pytest.mark.parametrize("model", [mixture, tiny_member])
def test_an_option_that_moves_sampling_is_refused(tmp_path, option, model):
    with pytest.raises(ValueError, match=f"{option} is"):
        trainer_of(tmp_path, model(), **{option: MOVED[option]})


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.05}, {"top_k": 5}, {"top_p": 0.5}, {"do_sample": False}, {"num_beams": 2},
        {"no_repeat_ngram_size": 2}, {"typical_p": 0.9}, {"sequence_bias": [[[5], 1.0]]}, {"eos_token_id": 5},
        {"min_tokens": 4}, {"unknown": 1}, {"suppress_tokens": [5]}, {"max_new_tokens": 400}, {"stop_strings": "a"},
        {"num_return_sequences": 2}, {"return_dict_in_generate": True}, {"cache_implementation": "quantized"},
    ],
)  # fmt: skip
def test_generation_kwargs_that_move_sampling_or_are_not_read_are_refused(tmp_path, given):
    (key,) = given
    with pytest.raises(ValueError, match=key):
        trainer_of(tmp_path, generation_kwargs=given)


def test_generation_kwargs_may_limit_where_a_rollout_ends(tmp_path):
    given = {"min_new_tokens": 4, "suppress_tokens": [2], "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0}
    assert trainer_of(tmp_path, generation_kwargs=given).generation_kwargs["min_new_tokens"] == 4


FIELDS = {
    "temperature": st.sampled_from([0.3, 1.0, 2.0]),
    "top_k": st.sampled_from([0, None, -1]),
    "min_p": st.sampled_from([None, 0.0]),
    "cache_implementation": st.sampled_from([None, "static", "dynamic"]),
    "use_cache": st.booleans(),
    "gradient_checkpointing": st.booleans(),
    "loss_head": st.sampled_from(["fused", "reference"]),
    "loss_type": st.sampled_from(["group", "grpo", "sapo"]),
    "pad_to_multiple_of": st.sampled_from([None, 8]),
}
NOT_KEYS = {"eos_token_id", "max_length", "max_new_tokens", "transformers_version", "disable_compile"}
KEYS = sorted({key for key in vars(GenerationConfig()) if not key.startswith("_")} - NOT_KEYS - set(ENDS))
MOVES = st.sampled_from([{}, {}, {}, *({option: value} for option, value in MOVED.items())])
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([0, 1, 2, 0.5, 1.0, 3.0, "static", [[5, 1.0]]]))


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    options=st.fixed_dictionaries({}, optional=FIELDS),
    given=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=1),
    moved=MOVES,
    attention_dropout=st.sampled_from([0.0, 0.5]),
    scheme=st.sampled_from(["logit", "prob"]),
)
def test_no_accepted_configuration_samples_what_is_not_scored(
    tmp_path, options, given, moved, attention_dropout, scheme
):
    members = tiny_member("qwen2", attention_dropout=attention_dropout), tiny_member("llama", seed=1)
    model = LogitMixForCausalLM.from_members(*members, alpha=0.4, scheme=scheme)
    trainer, refusal = None, ""
    try:
        trainer = trainer_of(tmp_path, model, generation_kwargs=given, **options | moved)
    except ValueError as error:
        refusal = str(error)
    if trainer is None:
        assert any(name in refusal for name in (*MOVED, "generation_kwargs")), refusal
    else:
        assert difference(trainer) < 1e-4
