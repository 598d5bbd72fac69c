"""Samples of alternating decoding against the enumerated probabilities of all completions."""

from collections import Counter

import pytest
import torch
from scipy.stats import chi2

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.generation import generate_completions
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import character_tokenizer, edit_logits, tiny_member

V, LENGTH, EOS, PROMPT = 6, 3, 4, [2, 3, 1]


def small_pair(scheme, edit=None, **anchor_sizes):
    members = [tiny_member("qwen2", 0, vocab_size=V), tiny_member("llama", 1, vocab_size=V, **anchor_sizes)]
    if edit is not None:
        edit_logits(members[1], edit)
    return LogitMixForCausalLM.from_members(*members, scheme=scheme), members


def sample(model, number, alpha, decoding="alternating", seed=0, **settings):
    """Completions of `PROMPT` and the statistics of decoding them."""
    settings = {
        "do_sample": True,
        "max_new_tokens": LENGTH,
        "top_k": 0,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    } | settings
    statistics = DecodingStatistics()
    torch.manual_seed(seed)
    completions = generate_completions(
        model, character_tokenizer(), [PROMPT] * number, settings, (), decoding, statistics, alpha=alpha
    )
    return completions, statistics


def truncate(probs, top_k=None, top_p=None, min_p=None):
    """By the definitions, in float64, without transformers' warpers. `probs` are `[V]`."""
    if top_k is not None:
        probs = torch.where(probs >= probs.sort(descending=True).values[top_k - 1], probs, 0.0)
        probs = probs / probs.sum()
    if top_p is not None:
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        probs = probs.index_fill(0, order[before >= top_p], 0.0)
        probs = probs / probs.sum()
    if min_p is not None:
        probs = torch.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


@torch.no_grad()
def enumerate_completions(members, alpha, scheme, temperature=1.0, **truncation):
    """The probability of every completion of `PROMPT`, which ends at EOS or after `LENGTH` tokens."""
    probabilities, open_ = {}, {(): 1.0}
    for _ in range(LENGTH):
        ids = torch.tensor([PROMPT + list(completion) for completion in open_])
        logits = [member(ids, use_cache=False).logits[:, -1].double() for member in members]
        mixed = mix_logits(logits, [1 - alpha, alpha], scheme)
        following = {}
        for (completion, probability), z in zip(open_.items(), mixed, strict=True):
            for token, p in enumerate(truncate((z / temperature).softmax(-1), **truncation).tolist()):
                if p > 0:
                    ended = token == EOS or len(completion) + 1 == LENGTH
                    (probabilities if ended else following)[(*completion, token)] = probability * p
        open_ = following
    assert sum(probabilities.values()) == pytest.approx(1)
    return probabilities


def assert_distributed(samples, probabilities):
    """Pearson's chi-square, with the rare completions in one cell; the seeds are fixed, so it never flickers."""
    counts, n = Counter(map(tuple, samples)), len(samples)
    assert set(counts) <= set(probabilities), "a completion of probability 0 was sampled"
    cells = [(counts[key], n * p) for key, p in probabilities.items() if n * p >= 5]
    rest = (n - sum(count for count, _ in cells), n - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert len(cells) > 5, "too few cells to see a difference"
    assert chi2.sf(statistic, len(cells) - 1) > 0.001, (statistic, len(cells) - 1)


SETTINGS = {
    "temperature 1": {},
    "temperature 1.7": {"temperature": 1.7},
    "temperature 0.6": {"temperature": 0.6},
    "top-k": {"top_k": 3, "temperature": 1.5},
    "top-p": {"top_p": 0.8, "temperature": 1.5},
    "min-p": {"min_p": 0.15, "temperature": 1.3},
    "all of them": {"top_k": 5, "top_p": 0.95, "min_p": 0.05, "temperature": 2.0},
}


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_samples_have_the_enumerated_distribution_at_each_sequences_alpha(settings, scheme):
    model, members = small_pair(scheme)
    alphas = [0.3, 0.8]
    samples, statistics = sample(model, 6000, alphas * 3000, **settings)
    for i, alpha in enumerate(alphas):
        assert_distributed(samples[i::2], enumerate_completions(members, alpha, scheme, **settings))
    assert 0.2 < statistics.acceptance < 1


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_samples_are_exact_where_a_member_rules_tokens_out(scheme):
    model, members = small_pair(scheme, edit=lambda z: z.index_fill_(-1, torch.tensor([1, 5]), -torch.inf))
    samples, _ = sample(model, 4000, 0.6, temperature=1.5)
    assert_distributed(samples, enumerate_completions(members, 0.6, scheme, temperature=1.5))


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 1.5}], ids=["whole", "top-p"])
def test_samples_are_exact_where_the_smaller_member_drafts_several_tokens(settings, scheme):
    model, members = small_pair(scheme, hidden_size=240, num_hidden_layers=6)
    samples, statistics = sample(model, 4000, 0.4, **settings)
    assert statistics.passes[0] > 1.2 * statistics.passes[1]
    assert_distributed(samples, enumerate_completions(members, 0.4, scheme, **settings))


def test_samples_are_exact_where_the_rule_changes_between_the_ways(monkeypatch):
    model, members = small_pair("logit")
    steps = iter(range(10**6))

    def take_turns(costs, num_open, acceptance, may_be_joint=True):
        return None if next(steps) % 3 == 1 else (1 + next(steps) % 2, 1)

    monkeypatch.setattr("logitmix.mixture.decoding.pass_costs.PassCosts.choose_num_drafts", take_turns)
    samples = [ids for seed in range(40) for ids in sample(model, 100, 0.4, "auto", seed)[0]]
    assert_distributed(samples, enumerate_completions(members, 0.4, "logit"))


def test_torchs_seed_fixes_the_samples():
    model, _ = small_pair("logit")

    def of_seed(seed):
        return sample(model, 4, 0.5, seed=seed, max_new_tokens=8)[0]

    assert of_seed(3) == of_seed(3) != of_seed(4)
