"""Tasks by name, each with problems, prompts, demonstrations and a grader. Importing this loads no torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from logitmix.tasks.arithmetic import Arithmetic
from logitmix.tasks.base import Problem, Split, Task
from logitmix.tasks.hendrycks_math import HendrycksMath
from logitmix.tasks.templates import BOXED_LINE, R1, Template
from logitmix.tasks.verify import Grade, answers_match, grade

__all__ = [
    "BOXED_LINE",
    "R1",
    "TASKS",
    "Arithmetic",
    "Grade",
    "HendrycksMath",
    "Problem",
    "Split",
    "Task",
    "Template",
    "answers_match",
    "grade",
    "load_task",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Arithmetic, HendrycksMath)}


def load_task(name: str, data: str | Path | None = None, seed: int = 0) -> Task:
    """The task of that name; `data` is a local copy, in place of the hub's, for the tasks that read data."""
    if name not in TASKS:
        nearest = get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no task {name!r}, did you mean {nearest!r}? The tasks are {', '.join(TASKS)}")
    if name == Arithmetic.name:
        if data is not None:
            raise ValueError(
                f"the task {name!r} is made by a seed and reads no data, but data is {data}; leave it out"
            )
        return Arithmetic(seed=seed)
    return HendrycksMath(data=data, seed=seed)
