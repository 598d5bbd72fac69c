r"""Near-duplicates: a problem that occurs in two splits, typed or worded slightly differently.

Two problems are near-duplicates if they use much the same words, the same numbers and symbols, and have the same
answer. Words alone would drop far too much: data sets have families of problems that differ in one number ("divided by
8", "divided by 9") and are not the same problem.

>>> train = Problem("How many integers are there in the solution set of $|x-2| \\leq 5.6$?", "11")
>>> test = Problem("How many integers are in the solution set of $|x-2|\\leq5.6$ ?", "11")
>>> near_duplicates([train], [test]) == [(train, test)]
True
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from logitmix.tasks.base import Problem
from logitmix.tasks.verify import answers_match

THRESHOLD = 0.5  # MATH's two near-duplicates have 0.9 and 0.6
MARKS = re.compile(
    r"[0-9]+|[-+*/^=<>]|\\[a-z]+|(?<![a-z])[a-z](?![a-z])|"
    r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twice|double|half)\b"
)


def near_duplicates(problems: Sequence[Problem], held_out: Sequence[Problem]) -> list[tuple[Problem, Problem]]:
    """The problems that are near-duplicates of held-out ones, each with the held-out one.

    "Much the same words" means a Jaccard index of at least THRESHOLD on triples of words. A triple weighs one over the
    number of other problems with it, so that phrases of a whole data set, such as those of multiple choice, hardly
    count. The cost is linear in the text, except for triples that many held-out problems share.
    """
    held_out_triples = [_triples(_text(problem)) for problem in held_out]
    places: dict[str, list[int]] = defaultdict(list)
    for i, triples in enumerate(held_out_triples):
        for triple in triples:
            places[triple].append(i)
    frequency = Counter({triple: len(indices) for triple, indices in places.items()})
    known_triples: list[set[str]] = []
    unknown_counts: list[int] = []  # triples in no held-out problem; each weighs 1
    for problem in problems:
        triples = _triples(_text(problem))
        known_triples.append(triples & places.keys())
        unknown_counts.append(len(triples) - len(known_triples[-1]))
        frequency.update(known_triples[-1])
    weights = {triple: 1 / max(1, count - 1) for triple, count in frequency.items()}
    held_out_weights = [sum(weights[triple] for triple in triples) for triples in held_out_triples]

    found = []
    for problem, known, unknown in zip(problems, known_triples, unknown_counts, strict=True):
        shared: dict[int, float] = defaultdict(float)
        for triple in known:
            for i in places[triple]:
                shared[i] += weights[triple]
        own = unknown + sum(weights[triple] for triple in known)
        for i, common in shared.items():
            if common >= THRESHOLD * (own + held_out_weights[i] - common) and _same(problem, held_out[i]):
                found.append((problem, held_out[i]))
                break
    return found


def _text(problem: Problem) -> str:
    return "\n".join([*(content for _, content in problem.history), problem.question])


def _triples(text: str) -> set[str]:
    words = re.findall(r"[a-z]+|[0-9]+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _same(one: Problem, other: Problem) -> bool:
    """Whether two problems have the same numbers and symbols, in any order, and the same answer."""
    marks, other_marks = (sorted(MARKS.findall(_text(problem).lower())) for problem in (one, other))
    return marks == other_marks and answers_match(one.answer, other.answer)
