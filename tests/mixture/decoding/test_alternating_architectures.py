"""Greedy alternating decoding of every architecture that can be a member, against the mixture without a KV cache."""

import pytest

from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.architectures import MODEL_TYPES, NOT_TRIED, tiny_causal_model
from tests.helpers.members import character_tokenizer

PROMPTS = [[5, 17, 9, 33, 21, 8, 40], [12], [44, 3, 29, 18, 56]]
SETTINGS = GREEDY | {"max_new_tokens": 14}
_QUICK = ("cohere2", "deepseek_v3", "gemma3_text", "gpt_oss", "lfm2_moe", "llama4_text", "moshi")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.sweep]) for name in MODEL_TYPES]
)
def test_greedy_tokens_are_those_of_the_mixture_without_a_cache(model_type):
    if model_type in NOT_TRIED:
        pytest.skip(NOT_TRIED[model_type])
    policy, anchor = tiny_causal_model(model_type), tiny_causal_model(model_type, seed=1)
    try:
        model = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4).eval()
    except ValueError:
        pytest.skip("it cannot be a member of a mixture")
    tokenizer = character_tokenizer()
    try:
        found = generate_completions(model, tokenizer, PROMPTS, SETTINGS, decoding="alternating")
    except ValueError as error:
        if "alternating decoding cannot be used with" not in str(error):
            raise
        return
    assert found == generate_completions(model, tokenizer, PROMPTS, SETTINGS | {"use_cache": False})
