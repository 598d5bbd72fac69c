r"""cn_k12: translated exercises of Chinese schools, a source of NuminaMath 1.5. Apache-2.0.

A raw record of the hub's `AI-MO/NuminaMath-1.5`, where `source == "cn_k12"`:

    {"problem": "Given that $\\sin α + 2\\cos α = \\frac{\\sqrt{10}}{2}$, find the value of $\\tan α$.",
     "solution": "Squaring both sides gives ... Therefore, $\\tan α = \\boxed{-\\frac{1}{3}}$.",
     "answer": "-\\frac{1}{3}", "problem_type": "Algebra", "question_type": "math-word-problem",
     "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "cn_k12", "synthetic": false}

About four in ten answers are a letter of a multiple choice. Left out are rows of other sources, those whose problem
or solution the data set's makers found invalid, those without an answer to compare (`proof`, `notfound`), and those
whose solution holds several boxes: they answer several questions at once, and `answer` holds only the last.
"""

from __future__ import annotations

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.templates import R1

NO_ANSWER = ("", "proof", "notfound")


class CnK12(DataTask):
    """cn_k12; the data has no test split, so that the seed carves one."""

    name = "cn_k12"
    hub_id = "AI-MO/NuminaMath-1.5"
    hub_test = None
    train_files = ("train*.jsonl", "cn_k12*.jsonl")
    columns = ("problem", "solution", "answer")
    template = R1

    def problem(self, row: Row) -> Problem | None:
        solution, answer = text(row["solution"]), text(row["answer"])
        valid = all(row.get(column, "Yes") == "Yes" for column in ("problem_is_valid", "solution_is_valid"))
        if row.get("source", self.name) != self.name or not valid:
            return None
        if answer.lower() in NO_ANSWER or solution.count("\\boxed") > 1:
            return None
        return Problem(text(row["problem"]), answer, solution or None)
