"""One-step word problems with numbers up to ten, generated offline from a seed; for the smallest instruct models.

    Mia has 7 apples and finds 5 more. How many apples does she have now?

The solution is one sentence, `Mia has 7 + 5 = 12 apples now.`, and the answer a whole number.
"""

from __future__ import annotations

import random

from logitmix.tasks.arithmetic import split_of
from logitmix.tasks.base import Problem, Split, Task, validate_request
from logitmix.tasks.templates import ANSWER_IS

SIZES: dict[Split, int] = {"train": 1_000, "validation": 100, "test": 200}
PEOPLE = (("Mia", "she"), ("Ben", "he"), ("Anna", "she"), ("Tom", "he"), ("Lucy", "she"), ("Max", "he"))
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "marbles", "cards", "eggs", "balloons")
BOXES = ("boxes", "bags", "baskets", "jars")

# operation: question and solution; `a` and `b` are the numbers, `c` the answer
STORIES: tuple[tuple[str, str, str], ...] = (
    (
        "+",
        "{who} has {a} {things} and finds {b} more. How many {things} does {pronoun} have now?",
        "{who} has {a} + {b} = {c} {things} now.",
    ),
    (
        "+",
        "There are {a} {things} on the table and {b} {things} on the floor. How many {things} are there in all?",
        "There are {a} + {b} = {c} {things} in all.",
    ),
    (
        "-",
        "{who} has {a} {things} and gives {b} of them to a friend. How many {things} does {pronoun} have left?",
        "{who} has {a} - {b} = {c} {things} left.",
    ),
    (
        "-",
        "There were {a} {things} in the shop, and {b} were sold. How many {things} are still in the shop?",
        "There are {a} - {b} = {c} {things} still in the shop.",
    ),
    (
        "*",
        "{who} fills {a} {boxes} with {b} {things} each. How many {things} does {pronoun} need?",
        "{who} needs {a} * {b} = {c} {things}.",
    ),
    (
        "/",
        "{who} shares {a} {things} equally among {b} {boxes}. How many {things} are in each?",
        "There are {a} / {b} = {c} {things} in each.",
    ),
)


class WordProblems(Task):
    """Word problems of one step with numbers from 2 to `largest`; `operations` are some of `+-*/`.

    Raises `ValueError` for other operations, and for a `largest` below 10, of which there are too few problems.
    """

    name = "word_problems"
    template = ANSWER_IS

    def __init__(self, seed: int = 0, largest: int = 10, operations: str = "+-") -> None:
        if largest < 10 or not operations or not set(operations) <= set("+-*/"):
            raise ValueError(
                f"largest is {largest} and operations {operations!r}; largest must be at least 10, and operations "
                "some of +-*/"
            )
        self.seed, self.largest = seed, largest
        self.stories = [story for story in STORIES if story[0] in operations]

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        validate_request(split, limit)
        rng = random.Random(f"{self.seed}/{split}")
        drawn: dict[str, Problem] = {}
        while len(drawn) < SIZES[split]:
            problem = self._draw(rng)
            if split_of(problem.question) == split:
                drawn.setdefault(problem.question, problem)
        return list(drawn.values())[:limit]

    def _draw(self, rng: random.Random) -> Problem:
        operation, question, solution = rng.choice(self.stories)
        a, b = rng.randint(2, self.largest), rng.randint(2, self.largest)
        if operation == "-":
            a, b = max(a, b) + 1, min(a, b)
        elif operation == "/":
            a *= b
        c = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]
        who, pronoun = rng.choice(PEOPLE)
        words = {"who": who, "pronoun": pronoun, "things": rng.choice(THINGS), "boxes": rng.choice(BOXES)}
        numbers = {"a": a, "b": b, "c": c}
        return Problem(question.format(**words, **numbers), str(c), solution.format(**words, **numbers))


class WordSums(WordProblems):
    """The word problems that are sums: as demonstrations, they do not cover the whole task."""

    name = "word_sums"

    def __init__(self, seed: int = 0, largest: int = 10) -> None:
        super().__init__(seed, largest, operations="+")
