r"""MATH (Hendrycks et al. 2021): competition problems with human solutions. MIT licence.

A raw record of the hub's `Maxwell-Jia/MATH`:

    {"problem": "Compute $\\dbinom{5}{3}$.", "level": "Level 2", "type": "Counting & Probability",
     "solution": "$\\dbinom{5}{3} = \\dfrac{5!}{3!2!} = \\boxed{10}.$"}

The gold is the last box of the solution, or the column `answer` if there is one, as in MATH-500.
"""

from __future__ import annotations

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.templates import R1, last_boxed

# The two training solutions that end in an empty box; both prove choice (A), which is 0.
ERRATA = {
    "For any integer $n>1$, the number of prime numbers greater than $n!+1$": "0",
    "You are given a sequence of $58$ terms; each term has the form $P+n$": "0",
}


class HendrycksMath(DataTask):
    """MATH, in the paper's template."""

    name = "hendrycks_math"
    hub_id = "Maxwell-Jia/MATH"
    columns = ("problem", "solution")
    answer_hint = "give it a column 'answer', or a \\boxed{...} in its solution"
    template = R1

    def problem(self, row: Row) -> Problem:
        question, solution = text(row["problem"], "problem"), text(row["solution"], "solution")
        answer = text(row.get("answer"), "answer") or last_boxed(solution) or _erratum(question)
        return Problem(question, answer or "", solution or None)


def _erratum(question: str) -> str | None:
    return next((gold for start, gold in ERRATA.items() if question.startswith(start)), None)
