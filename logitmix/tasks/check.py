"""Checks a task: is every text a text, and does every gold, written in the template, grade as right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logitmix.tasks.base import SPLITS, Problem, Task
from logitmix.tasks.rows import written_by_program
from logitmix.tasks.verify.grading import MAX_LENGTH, unread


@dataclass(frozen=True)
class Checked:
    """A split of a task, or the problems dropped from all splits, with one sentence for each failure.

    unread: one sentence for each gold that the verifier's grammar does not read, so that it equals only its own text
    """

    name: str
    problems: int
    failures: tuple[str, ...]
    unread: tuple[str, ...] = ()

    @property
    def accepted(self) -> int:
        """The number of golds that grade as right."""
        return self.problems - min(self.problems, len(self.failures))


def check(task: Task) -> list[Checked]:
    """Grade the golds of each split, and of each kind of dropped problems, through the task's own template.

    Raises `ValueError` if the training problems cannot be read.
    """
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
    failures, not_read = [], []
    for number, problem in enumerate(problems, start=1):
        failure = _failure(task, problem)
        if failure is not None:
            failures.append(f"{name} {number}: {failure}")
        elif type(task).grade is Task.grade and (reason := unread(problem.answer)) is not None:
            not_read.append(f"{name} {number}: {problem.answer!r}: {reason}")
    return Checked(name, len(problems), tuple(failures), tuple(not_read))


def _failure(task: Task, problem: Problem) -> str | None:
    """Why no response could solve the problem, or None.

    A gold that is compared with itself is always equal, whatever it is. So its texts are also searched for what only
    programs write, and it is graded in another spelling.
    """
    for name, text in (("question", problem.question), ("gold", problem.answer), ("solution", problem.solution or "")):
        kind = written_by_program(text)
        if kind is not None:
            return f"the {name} {text[:80]!r} is a program's way to write {kind}; the task must make it a text"
    try:
        task.prompt(problem)
        if problem.solution is not None:
            response = task.demonstration(problem)
        else:
            response = task.template.completion("", problem.answer)
        respelled = task.template.completion("", f"${problem.answer}$")
    except ValueError as error:
        return str(error)
    grade = task.grade(response, problem)
    if not grade.answer_ok:
        reason = grade.error or ("it grades as wrong" if grade.format_ok else "it is not format-correct")
        return f"the gold {problem.answer!r} does not match itself: {reason}"
    if type(task).grade is not Task.grade:  # a user's grader need not know formulas
        return None
    grade = task.grade(respelled, problem)
    # a user's template may have no place for dollar signs, and a long gold is compared letter by letter only
    if grade.format_ok and not grade.answer_ok and len(problem.answer) < MAX_LENGTH - 2:
        return f"the gold {problem.answer!r} is not matched by ${problem.answer}$, the same answer as a formula"
    return None
