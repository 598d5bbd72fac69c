"""Tasks by name, each with problems, prompts, demonstrations and a grader. Importing them does not load torch."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path

from logitmix.tasks.arithmetic import Arithmetic
from logitmix.tasks.base import SPLITS, Problem, Split, Task
from logitmix.tasks.cn_k12 import CnK12
from logitmix.tasks.data import DataTask
from logitmix.tasks.gsm8k import Gsm8k
from logitmix.tasks.hendrycks_math import HendrycksMath
from logitmix.tasks.jsonl import JsonLines
from logitmix.tasks.mmlu import Mmlu
from logitmix.tasks.names import unknown_name
from logitmix.tasks.templates import ANSWER_IS, BOXED, BOXED_LINE, R1, Prompt, Template, load_template
from logitmix.tasks.verify import Grade, answers_match, grade
from logitmix.tasks.word_problems import WordProblems, WordSums

__all__ = [
    "ANSWER_IS",
    "BOXED",
    "BOXED_LINE",
    "R1",
    "SPLITS",
    "TASKS",
    "Arithmetic",
    "CnK12",
    "DataTask",
    "Grade",
    "Gsm8k",
    "HendrycksMath",
    "JsonLines",
    "Mmlu",
    "Problem",
    "Prompt",
    "Split",
    "Task",
    "Template",
    "WordProblems",
    "WordSums",
    "answers_match",
    "grade",
    "load_task",
    "load_template",
]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Arithmetic, WordProblems, WordSums, HendrycksMath, CnK12, Mmlu, Gsm8k, JsonLines)
}


def load_task(
    name: str,
    data: str | Path | None = None,
    seed: int = 0,
    template: str | Template | None = None,
    **columns: str | None,
) -> Task:
    """The task of that name, or your own as `module.Class`, imported from the working directory.

    data:     local file or folder to read instead of the hub, for tasks that read data
    seed:     determines what is drawn or held out
    template: a name, a YAML file (`load_template`), or a `Template`, instead of the task's own
    columns:  `question_column`, `answer_column`, `solution_column` of the task `jsonl`

    Raises `ValueError` for an unknown task or template, data that does not exist, and options that the task does not
    read.
    """
    task_class = TASKS[name] if name in TASKS else _import_task(name)
    options = {key: value for key, value in {"data": data, **columns}.items() if value is not None}
    accepted = inspect.signature(task_class).parameters
    for key, value in options.items():
        if key not in accepted:
            what = "reads no data" if key == "data" else "does not choose its columns"
            raise ValueError(f"the task {name!r} {what}, but {key} is {value}; leave it out")
    task = task_class(seed=seed, **options)  # type: ignore[call-arg]
    if template is not None:
        task.template = template if isinstance(template, Template) else load_template(template)
    return task


def _import_task(name: str) -> type[Task]:
    module_name, dot, class_name = name.rpartition(".")
    if not dot:
        raise unknown_name("task", name, TASKS, f"The tasks are {', '.join(TASKS)}, or your own as module.Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the task {name!r} cannot be imported: {error}; its module must be in the working directory"
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"{module_name} has no class {class_name!r} that is a logitmix.tasks.Task")
    return found
