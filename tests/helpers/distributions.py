"""The exact distribution of a mixture's samples, and Pearson's chi-square of what was sampled."""

import torch

from tests.helpers.members import VOCAB_SIZE


def exact_marginals(mixture, prompt, alpha, temperature, top_k=VOCAB_SIZE):
    """The distribution of the first three tokens after a prompt, each over the tokens before it."""

    def next_probabilities(sequences):
        with torch.no_grad():
            logits = mixture(input_ids=torch.tensor(sequences), alpha=alpha).logits[:, -1].double()
        smallest = logits.topk(top_k).values[:, -1:]
        return (logits.masked_fill(logits < smallest, -torch.inf) / temperature).softmax(-1)

    tokens = range(VOCAB_SIZE)
    first = next_probabilities([prompt])[0]
    second = next_probabilities([[*prompt, a] for a in tokens])
    third = next_probabilities([[*prompt, a, b] for a in tokens for b in tokens])
    pairs = (first[:, None] * second).flatten()
    return [first, first @ second, pairs @ third]


def assert_chi_square(tokens, probabilities):
    """Pearson's statistic is within the normal approximation's 4.5 standard deviations of its degrees of freedom.

    A sample of the right distribution fails once in 300,000. Cells with fewer than 5 expected are pooled.
    """
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).double()
    expected = probabilities * len(tokens)
    large = expected >= 5
    counts = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(counts) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5, (statistic, freedom)
