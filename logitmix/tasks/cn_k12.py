r"""cn_k12: translated Chinese school exercises, one of the sources of NuminaMath 1.5. Apache-2.0.

A raw record of the hub's `AI-MO/NuminaMath-1.5`, where `source == "cn_k12"`:

    {"problem": "Given that $\\sin α + 2\\cos α = \\frac{\\sqrt{10}}{2}$, find the value of $\\tan α$.",
     "solution": "Squaring both sides gives ... Therefore, $\\tan α = \\boxed{-\\frac{1}{3}}$.",
     "answer": "-\\frac{1}{3}", "problem_type": "Algebra", "question_type": "math-word-problem",
     "problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "cn_k12", "synthetic": false}

About four in ten answers are letters of a multiple choice. The task leaves out rows of other sources, rows whose
problem or solution the authors of the data set marked as invalid, rows without an answer to compare (`proof`,
`notfound`), and rows whose solution has several boxes: they answer several questions, and `answer` has only the last.
"""

from __future__ import annotations

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.templates import R1

NO_ANSWER = ("", "proof", "notfound")


class CnK12(DataTask):
    """cn_k12. The data has no test split, so the seed selects one."""

    name = "cn_k12"
    hub_id = "AI-MO/NuminaMath-1.5"
    hub_test = None
    train_files = ("train*.jsonl", "cn_k12*.jsonl")
    columns = ("problem", "solution", "answer")
    template = R1

    def problem(self, row: Row) -> Problem | None:
        solution, answer = text(row["solution"], "solution"), text(row["answer"], "answer")
        valid = all(row.get(column, "Yes") == "Yes" for column in ("problem_is_valid", "solution_is_valid"))
        if row.get("source", self.name) != self.name or not valid:
            return None
        if answer.lower() in NO_ANSWER or solution.count("\\boxed") > 1:
            return None
        return Problem(text(row["problem"], "problem"), answer, solution or None)
