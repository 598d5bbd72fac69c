r"""Chains of additions and subtractions, generated offline from a seed; a character model learns them in seconds.

A problem, the usual solution in the base corpus, and a demonstration that leaps over the steps:

    7+8-9+4=?           7+8-9+4=?           7+8-9+4=?
                        7+8=15              7+8-9+4=10
                        15-9=6              \boxed{10}
                        6+4=10
                        so 10

The base corpus mostly reasons step by step and rarely keeps the format; the demonstrations always keep the format and
mostly leap. All of them are right, but a small model that has learnt to leap is fragile: it cannot do in one step what
it can do in three. This yields the paper's pair: a base model that can reason, and an SFT model that can format.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Any

from logitmix.tasks.base import Problem, Split, Task, validate_request
from logitmix.tasks.templates import BOXED_LINE

SIZES: dict[Split, int] = {"train": 20_000, "validation": 500, "test": 500}
SHARES: dict[Split, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of all questions
PLAIN_ENDINGS = ("so {answer}", "it is {answer}", "answer {answer}")


class Arithmetic(Task):
    """Chains of `terms` numbers from 1 to `largest`.

    boxed_share:     share of the base corpus that ends in the required format
    base_leap_share: share of the base corpus that leaps over the steps
    leap_share:      share of the demonstrations that leap over the steps
    """

    name = "arithmetic"
    template = BOXED_LINE
    alphabet = "".join(sorted(set("0123456789+-=?\n\\boxed{}" + "".join(PLAIN_ENDINGS))))

    def __init__(
        self,
        seed: int = 0,
        terms: int = 4,
        largest: int = 9,
        boxed_share: float = 0.04,
        base_leap_share: float = 0.3,
        leap_share: float = 0.7,
    ) -> None:
        shares = {"boxed_share": boxed_share, "base_leap_share": base_leap_share, "leap_share": leap_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, but a share must be between 0 and 1")
        if terms < 2 or largest < 2:
            raise ValueError(f"terms is {terms} and largest {largest}; both must be at least 2")
        self.seed, self.terms, self.largest = seed, terms, largest
        self.boxed_share, self.base_leap_share, self.leap_share = boxed_share, base_leap_share, leap_share

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        """`limit` problems, which may exceed the default sizes in SIZES."""
        validate_request(split, limit)
        return self._draw(split, f"{self.seed}/{split}", SIZES[split] if limit is None else limit)

    def demonstration(self, problem: Problem) -> str:
        """A demonstration in the format, mostly with a leap; the choice depends on the question and the seed only."""
        rng = random.Random(f"{self.seed}/demonstrations/{problem.question}")
        return self.template.completion(_write_solution(problem, rng, self.leap_share), problem.answer)

    def base_corpus(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Training rows for a base model, with `prompt` and `completion`: right, and rarely in the format.

        Problems come from the train split, and are drawn independently of `problems("train")`.
        """
        drawn = self._draw("train", f"{self.seed}/base", SIZES["train"] if limit is None else limit)
        return [self.row(problem, self._base_solution(problem)) for problem in drawn]

    def _base_solution(self, problem: Problem) -> str:
        rng = random.Random(f"{self.seed}/base/{problem.question}")
        solution = _write_solution(problem, rng, self.base_leap_share)
        if rng.random() < self.boxed_share:
            return self.template.completion(solution, problem.answer)
        return f"{solution}\n{rng.choice(PLAIN_ENDINGS).format(answer=problem.answer)}"

    def _draw(self, split: Split, stream: str, count: int) -> list[Problem]:
        most = int(self.largest**self.terms * 2 ** (self.terms - 1) * SHARES[split] / 2)
        if count > most:
            raise ValueError(
                f"{count} {split} problems are more than {most}, the limit for {self.terms} terms up to "
                f"{self.largest}; ask for fewer, or raise terms or largest"
            )
        rng = random.Random(stream)
        drawn: dict[str, Problem] = {}
        while len(drawn) < count:
            question = self._question(rng)
            if question not in drawn and split_of(question) == split:
                solution, answer = _solve(question)
                drawn[question] = Problem(question, answer, solution)
        return list(drawn.values())

    def _question(self, rng: random.Random) -> str:
        numbers = [rng.randint(1, self.largest) for _ in range(self.terms)]
        return str(numbers[0]) + "".join(f"{rng.choice('+-')}{number}" for number in numbers[1:])


def split_of(question: str) -> Split:
    """The split of a question depends on the question only, so no seed trains on another's test questions."""
    place = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=4).digest()) / 2**32
    if place < SHARES["train"]:
        return "train"
    return "validation" if place < SHARES["train"] + SHARES["validation"] else "test"


def _write_solution(problem: Problem, rng: random.Random, leap_share: float) -> str:
    """The worked solution or, with some probability, the leap from the question to the answer."""
    if rng.random() < leap_share:
        return f"{problem.question}={problem.answer}"
    return problem.solution or ""


def _solve(question: str) -> tuple[str, str]:
    """The steps, one per line, and the answer."""
    value, *terms = (int(term) for term in re.findall(r"[+-]?\d+", question))
    steps = []
    for term in terms:
        steps.append(f"{value}{term:+d}={value + term}")
        value += term
    return "\n".join(steps), str(value)
