"""The rule that chooses between joint and alternating decoding, against simulations and limits."""

import random

import pytest

from logitmix.mixture.decoding.pass_costs import MAX_DRAFTS, PassCosts, tokens_of_a_cycle
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import tiny_member


def simulate(num_drafts, acceptance, cycles=20_000):
    """Tokens of a turn of each member, one drafting `num_drafts` tokens and the other one, drawn draft by draft."""
    rng, tokens, drafts = random.Random(0), 0, num_drafts
    for _ in range(cycles):
        accepted = 0
        for _ in range(drafts):
            tokens += 1
            if rng.random() >= acceptance:
                break
            accepted += 1
        all_accepted, drafts = accepted == drafts, num_drafts
        if all_accepted:  # the other member drafts one token
            tokens += 1
            if rng.random() >= acceptance:
                drafts -= 1
    return tokens / cycles


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("num_drafts", [1, 2, 5])
def test_the_tokens_of_a_cycle_are_those_of_a_simulation(num_drafts, acceptance):
    assert tokens_of_a_cycle(num_drafts, acceptance) == pytest.approx(simulate(num_drafts, acceptance), rel=0.02)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9, 1.0])
def test_one_draft_each_takes_two_minus_the_acceptance_passes(acceptance):
    assert 2 / tokens_of_a_cycle(1, acceptance) == pytest.approx(2 - acceptance, abs=1e-5)


def test_equal_members_draft_one_token_each_while_few_sequences_are_open():
    costs = PassCosts((1e8, 1e8), fixed_tokens=8)
    assert costs.choose_num_drafts(1, 0.8) == (1, 1)
    assert costs.choose_num_drafts(64, 0.8) is None
    assert costs.choose_num_drafts(64, 0.8, may_be_joint=False) == (1, 1)


def test_the_more_drafts_pass_the_more_sequences_are_worth_it():
    costs = PassCosts((1e8, 1e8), fixed_tokens=8)
    limits = [
        max((n for n in range(1, 2000) if costs.choose_num_drafts(n, a) is not None), default=0)
        for a in (0.1, 0.5, 0.8, 0.95)
    ]
    assert limits == sorted(limits)
    assert limits[0] < limits[-1]


def test_the_smaller_member_drafts_more_the_smaller_it_is():
    numbers = [PassCosts((size, 1.0), 1e4).choose_num_drafts(1, 0.8) for size in (1.0, 0.3, 0.1, 0.001)]
    assert [other for _, other in numbers] == [1] * 4
    assert numbers[0][0] == 1 < numbers[1][0] < numbers[2][0] < numbers[3][0] <= MAX_DRAFTS
    assert PassCosts((1.0, 0.3), 1e4).choose_num_drafts(1, 0.8) == numbers[1][::-1]


def test_sizes_leave_out_an_embedding_that_is_no_head():
    model = LogitMixForCausalLM.from_members(
        tiny_member("qwen2", tie_word_embeddings=False), tiny_member("qwen2", tie_word_embeddings=True)
    )
    untied, tied = PassCosts.of(model).sizes
    assert untied == tied
