"""Samples of alternating decoding against the enumerated probabilities of all completions."""

from collections import Counter

import pytest
import torch
from scipy.stats import chi2
from transformers import GenerationConfig

from logitmix.mixture.alternating import alternating_completions
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.speculation import SpeculativeSampler
from tests.helpers.members import edit_logits, tiny_member

V, LENGTH, EOS, PROMPT = 6, 3, 4, [2, 3, 1]


def small_pair(scheme, edit=None):
    members = [tiny_member("qwen2", 0, vocab_size=V), tiny_member("llama", 1, vocab_size=V)]
    if edit is not None:
        edit_logits(members[1], edit)
    return LogitMixForCausalLM.from_members(*members, scheme=scheme), members


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
    samples = alternating_completions(
        model,
        [PROMPT] * 6000,
        {"do_sample": True, "max_new_tokens": LENGTH, "top_k": 0} | settings,
        [EOS],
        alphas=alphas * 3000,
        generator=torch.Generator().manual_seed(0),
    )
    for i, alpha in enumerate(alphas):
        assert_distributed(samples.token_ids[i::2], enumerate_completions(members, alpha, scheme, **settings))
    assert 0.2 < samples.statistics.acceptance < 1


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_samples_are_exact_where_a_member_rules_tokens_out(scheme):
    model, members = small_pair(scheme, edit=lambda z: z.index_fill_(-1, torch.tensor([1, 5]), -torch.inf))
    settings = {"do_sample": True, "max_new_tokens": LENGTH, "top_k": 0, "temperature": 1.5}
    generator = torch.Generator().manual_seed(0)
    samples = alternating_completions(model, [PROMPT] * 4000, settings, [EOS], alphas=0.6, generator=generator)
    assert_distributed(samples.token_ids, enumerate_completions(members, 0.6, scheme, temperature=1.5))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.02}, {"temperature": None, "top_k": None}],
)
def test_distributions_are_those_of_generate(settings):
    member = tiny_member("qwen2", vocab_size=200)
    ids = torch.tensor([[5, 17, 9]])
    config = GenerationConfig(do_sample=True, max_new_tokens=1, **settings)
    output = member.generate(ids, generation_config=config, output_scores=True, return_dict_in_generate=True)
    sampler = SpeculativeSampler({"do_sample": True} | settings)
    with torch.no_grad():
        _, log_q = sampler.draft(member(ids).logits[:, -1])
    torch.testing.assert_close(log_q, output.scores[0].log_softmax(-1))


def test_the_generator_or_torchs_seed_fixes_the_samples():
    model, _ = small_pair("logit")

    def sample(generator=None):
        settings = {"do_sample": True, "max_new_tokens": 8}
        return alternating_completions(model, [PROMPT] * 4, settings, generator=generator).token_ids

    def of_torch(seed):
        torch.manual_seed(seed)
        return sample()

    assert sample(torch.Generator().manual_seed(3)) == sample(torch.Generator().manual_seed(3))
    assert of_torch(3) == of_torch(3) != of_torch(4)
