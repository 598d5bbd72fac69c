"""Which prompts and completions fit the context that the members share."""

import pytest

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import tiny_member


def test_the_context_of_a_mixture_is_its_shortest_members():
    members = tiny_member("qwen2", 0), tiny_member("llama", 1, max_position_embeddings=64)
    assert context_length(LogitMixForCausalLM.from_members(*members).config) == 64
    assert context_length(members[0].config) == 128


@pytest.mark.parametrize(("context", "prompt", "new"), [(10, 6, 4), (10, 1, 1), (None, 10**6, 10**6)])
def test_what_fits_the_context_is_accepted(context, prompt, new):
    validate_fits_context(context, prompt, new)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "^prompt 3 has 7 tokens; with limit 4 that exceeds the members' context of 10; shorten .*or lower limit$"),
        (10, "^prompt 3 has 10 tokens, which leaves no room for a completion in the members' context of 10; shorten"),
    ],
)
def test_the_error_names_prompt_limit_and_context(prompt, message):
    with pytest.raises(ValueError, match=message):
        validate_fits_context(10, prompt, 4, prompt="prompt 3", option="limit")
