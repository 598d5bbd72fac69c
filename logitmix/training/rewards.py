"""The paper's reward: 1 for a right answer in the required format, else 0."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from logitmix.tasks import Problem, Task


def grpo_dataset(task: Task, problems: Sequence[Problem]) -> Dataset:
    """Rows for TRL's `GRPOTrainer`: the `prompt`, and the `question` and gold `answer` that the reward reads."""
    if not problems:
        raise ValueError("the data set is empty; training needs at least one problem")
    return Dataset.from_list(
        [
            {"prompt": task.prompt(problem), "question": problem.question, "answer": problem.answer}
            for problem in problems
        ]
    )


class TaskReward:
    """A reward function for TRL: `r = 1` where the answer is right and stands in the format, else 0 (eq. 4).

    Logs the shares of format-correct, answer-correct and leniently correct completions beside it.
    """

    __name__ = "task_reward"

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(
        self,
        completions: Sequence[str],
        question: Sequence[str],
        answer: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        grades = [
            self.task.grade(completion, Problem(asked, gold))
            for completion, asked, gold in zip(completions, question, answer, strict=True)
        ]
        if log_metric is not None:
            for name in ("format_ok", "answer_ok", "lenient_ok"):
                log_metric(name.replace("_ok", "_rate"), sum(getattr(g, name) for g in grades) / len(grades))
        return [float(grade.answer_ok) for grade in grades]
