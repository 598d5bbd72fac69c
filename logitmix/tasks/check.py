"""Checks a task: does every gold, written in the template, grade as right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logitmix.tasks.base import SPLITS, Problem, Task


@dataclass(frozen=True)
class Checked:
    """A split of a task, or the problems dropped from all splits, with one sentence for each failure."""

    name: str
    problems: int
    failures: tuple[str, ...]

    @property
    def accepted(self) -> int:
        """The number of golds that grade as right."""
        return self.problems - min(self.problems, len(self.failures))


def check(task: Task) -> list[Checked]:
    """Grade the golds of each split, and of each kind of dropped problems, through the task's own template."""
    checked = []
    for split in SPLITS:
        try:
            problems = task.problems(split)
        except ValueError as error:
            if split == "train":  # the data cannot be read at all
                raise
            checked.append(Checked(split, 0, (str(error),)))
        else:
            checked.append(_check(task, split, problems))
    return checked + [_check(task, name, problems) for name, problems in task.dropped.items()]


def _check(task: Task, name: str, problems: Sequence[Problem]) -> Checked:
    failures = []
    for number, problem in enumerate(problems, start=1):
        try:
            if problem.solution is not None:
                response = task.demonstration(problem)
            else:
                response = task.template.completion("", problem.answer)
        except ValueError as error:
            failures.append(f"{name} {number}: {error}")
            continue
        grade = task.grade(response, problem)
        if not grade.answer_ok:
            reason = grade.error or ("it grades as wrong" if grade.format_ok else "it is not format-correct")
            failures.append(f"{name} {number}: the gold {problem.answer!r} does not match itself: {reason}")
    return Checked(name, len(problems), tuple(failures))
