"""The turns of two members on the device, in a plain loop of decoding instead of vLLM's.

A member's logits are a function of the last two tokens, so the mixture's distribution is known exactly.
"""

import torch

from logitmix.mixture.mixing import mix_logits
from logitmix.serving.alternating.slots import NONE, SlotTurns, Step

V = 5
START = (0, 1)


def tables(noise=1.0):
    """The logits of two members, by the last two tokens; they are near each other if there is little noise."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(V, V, V, generator=generator)
    return first, first + noise * torch.randn(V, V, V, generator=generator)


class Loop:
    """Decodes one request in each of N slots, each at its own alpha and temperature."""

    def __init__(self, members, alphas, temperatures, seed=0):
        N = len(alphas)
        self.members, self.temperatures = members, torch.tensor(temperatures)
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = torch.tensor([[1 - alpha, alpha] for alpha in alphas])
        self.slots = torch.randperm(N, generator=self.generator)
        self.by_slot = torch.empty_like(self.weights)
        self.by_slot[self.slots] = self.weights
        self.turns = SlotTurns(N, V, torch.device("cpu"), self.mix)
        self.tokens = torch.tensor([START] * N)
        self.tokens = torch.nn.functional.pad(self.tokens, (0, 256), value=NONE)
        self.lengths = torch.full((N,), len(START))
        self.drafts, self.drafter = torch.full((N,), NONE), None

    def mix(self, logits, slots):
        return mix_logits(logits, self.by_slot[slots], "logit")

    def probabilities(self, logits):
        greedy = torch.nn.functional.one_hot(logits.argmax(-1), V).float()
        sampled = (logits / self.temperatures.clamp(min=1e-6)[:, None]).softmax(-1)
        return torch.where(self.temperatures[:, None] == 0, greedy, sampled)

    def draw(self, probabilities):
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def step(self, member):
        """One step of `member`, or of both if None, as vLLM's runner and its rejection sampler take it."""
        N, slots, drafts = len(self.lengths), self.slots, self.drafts
        before, last = (self.tokens[torch.arange(N), self.lengths - n] for n in (2, 1))
        has_draft = drafts != NONE
        first = torch.cat([torch.zeros(1, dtype=torch.long), (1 + has_draft.long()).cumsum(0)])[:-1]
        rows = torch.empty(N + int(has_draft.sum()), V)

        def logits(a, b):
            pair = [table[a, b] for table in self.members]
            return self.mix(pair, slots) if member is None else pair[member]

        rows[first] = logits(before, last)
        after = logits(last, drafts.clamp(min=0))
        rows[first[has_draft] + 1] = after[has_draft]

        step = Step(slots, first, self.lengths - 1, drafts)
        mixed = self.turns.mix(member, step, rows)
        p, q = self.probabilities(mixed[first]), self.probabilities(self.turns.logits_SV[slots])
        at_draft = drafts.clamp(min=0)[:, None]
        ratio = p.gather(1, at_draft) / q.gather(1, at_draft)
        is_accepted = has_draft & (torch.rand(N, generator=self.generator) < ratio[:, 0])
        residual = torch.where(has_draft[:, None], (p - q).clamp(min=0), p)
        corrected = self.draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p))
        bonus = self.draw(self.probabilities(mixed[first + has_draft]))
        sampled = torch.stack([torch.where(is_accepted, drafts, corrected), bonus], 1)

        counts = self.turns.judge(sampled[:, 0], 1 + is_accepted.int())
        for i in range(2):
            rows_of = torch.arange(N)[counts > i]
            self.tokens[rows_of, self.lengths[rows_of] + i] = sampled[rows_of, i]
        self.lengths = self.lengths + counts
        self.drafts = self.turns.draft(lambda z, s, p: self.draw(self.probabilities(z)))
        self.drafter = member if (self.drafts != NONE).any() else None

    def run(self, length, kinds=("turn",)):
        """Decode until all requests have `length` tokens; each step is of the next kind."""
        i = 0
        while (self.lengths < length).any():
            kind = kinds[i % len(kinds)]
            if kind == "forget":
                self.turns.forget()
            member = None if kind == "joint" else 1 - self.drafter if self.drafter is not None else i % 2
            self.step(member)
            i += 1
        return self.tokens[:, len(START) : length].tolist()


def greedy(members, alpha, length):
    tokens = list(START)
    for _ in range(length):
        pair = [table[tokens[-2], tokens[-1]][None] for table in members]
        tokens.append(mix_logits(pair, [1 - alpha, alpha], "logit").argmax().item())
    return tokens[len(START) :]


KINDS = ("turn", "turn", "turn", "joint", "turn", "turn", "forget", "turn", "joint", "joint")


def test_greedy_tokens_of_turns_and_joint_steps_are_those_of_the_mixture():
    members, alphas = tables(), [i / 15 for i in range(16)]
    for kinds in (("turn",), KINDS):
        loop = Loop(members, alphas, [0.0] * 16)
        assert loop.run(20, kinds) == [greedy(members, alpha, 18) for alpha in alphas]


def test_samples_of_turns_and_joint_steps_have_the_mixtures_distribution():
    """Of sequences of three tokens, by Pearson's chi-square; half of the requests are greedy."""
    members, alpha, temperature, N = tables(), 0.3, 0.8, 20_000

    def next_probabilities(a, b):
        mixed = mix_logits([table[a, b][None] for table in members], [1 - alpha, alpha], "logit")
        return (mixed[0].double() / temperature).softmax(-1)

    expected = torch.zeros(V, V, V, dtype=torch.double)
    for a in range(V):
        for b in range(V):
            first = next_probabilities(*START)[a] * next_probabilities(START[1], a)[b]
            expected[a, b] = first * next_probabilities(a, b)
    for seed, kinds in enumerate((("turn",), KINDS)):
        loop = Loop(members, [alpha] * N, [temperature, 0.0] * (N // 2), seed)
        samples = torch.tensor(loop.run(5, kinds))
        sampled = samples[::2] @ torch.tensor([V * V, V, 1])
        counts = torch.bincount(sampled, minlength=V**3).double()
        cells = expected.flatten() * len(sampled)
        statistic = ((counts - cells) ** 2 / cells).sum().item()
        assert statistic < V**3 - 1 + 4.5 * (2 * (V**3 - 1)) ** 0.5
        assert (samples[1::2] == torch.tensor(greedy(members, alpha, 3))).all()


def test_passes_per_token_follow_from_the_acceptance_rate():
    loop = Loop(tables(), [0.5] * 64, [1.0] * 64)
    loop.run(60)
    counts = loop.turns.statistics()
    assert counts.tokens == (loop.lengths - len(START)).sum()
    assert 0.3 < counts.acceptance < 1
    assert abs(counts.passes_per_token - (2 - counts.acceptance)) < 0.05


def test_identical_members_take_one_pass_per_token():
    loop = Loop((tables()[0],) * 2, [0.5] * 4, [0.0, 0.8, 0.0, 1.0])
    loop.run(40)
    counts = loop.turns.statistics()
    assert counts.acceptance == 1
    assert sum(counts.passes) == counts.tokens + 4  # the first turn yields no token


def test_a_slot_forgets_the_request_before():
    loop = Loop(tables(), [0.5] * 2, [0.0] * 2)
    loop.step(0)
    loop.turns.forget([int(loop.slots[1])])
    loop.step(1)
    assert loop.lengths.tolist() == [3, 2]
