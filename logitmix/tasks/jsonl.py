"""Your own questions: a file of JSON lines, or a folder with train*.jsonl and test*.jsonl, with named columns.

A raw record, with the default names:

    {"question": "What is 2+3?", "answer": "5"}

A question may be a chat, as messages with a role and a content; the last one asks. An answer may be a dict with
`ground_truth`, as in verl's column `reward_model`. docs/tasks.md lists what is opened and what is refused.

A third column can hold worked solutions: SFT needs them, training and evaluation do not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.templates import R1


class JsonLines(DataTask):
    """Rows of `question_column`, `answer_column` and, for SFT, `solution_column`."""

    name = "jsonl"
    template = R1

    def __init__(
        self,
        data: str | Path | None = None,
        seed: int = 0,
        question_column: str = "question",
        answer_column: str = "answer",
        solution_column: str | None = None,
    ) -> None:
        super().__init__(data, seed)
        self.question_column, self.answer_column = question_column, answer_column
        self.solution_column = solution_column
        self.columns = tuple(name for name in (question_column, answer_column, solution_column) if name is not None)

    def problem(self, row: Row) -> Problem:
        solution = text(row[self.solution_column], "solution") if self.solution_column is not None else ""
        problem = Problem(row[self.question_column], text(row[self.answer_column], "answer"), solution or None)
        return replace(problem, question=problem.question.strip())
