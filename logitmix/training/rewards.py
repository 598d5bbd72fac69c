"""The paper's reward: 1 for a right answer in the required format, else 0."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from logitmix.tasks import Problem, Task
from logitmix.tasks.verify.evaluation import TOO_LONG

WARN_SHARE = 0.01  # of a batch without a verdict


def grpo_dataset(task: Task, problems: Sequence[Problem]) -> Dataset:
    """Rows for TRL's `GRPOTrainer`: the `prompt`, and the `question` and gold `answer` for the reward."""
    if not problems:
        raise ValueError("the data set is empty; training needs at least one problem")
    return Dataset.from_list(
        [
            {"prompt": task.prompt(problem), "question": problem.question, "answer": problem.answer}
            for problem in problems
        ]
    )


class TaskReward:
    """A reward function for TRL: `r = 1` for a right answer in the required format, else 0 (eq. 4).

    It also logs the shares of format-correct, answer-correct and leniently correct completions, and in
    `verifier/errors` and `verifier/timeouts` how many completions got 0 because the verifier reached no verdict. Those
    that are not format-correct would get 0 anyway, and are not counted.
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
        cases = zip(completions, question, answer, strict=True)
        grades = [self.task.grade(completion, Problem(text, gold)) for completion, text, gold in cases]
        errors = [grade.error for grade in grades if grade.format_ok and grade.error is not None]
        if log_metric is not None:
            for name in ("format_ok", "answer_ok", "lenient_ok"):
                log_metric(name.replace("_ok", "_rate"), sum(getattr(g, name) for g in grades) / len(grades))
            log_metric("verifier/errors", float(len(errors)))
            log_metric("verifier/timeouts", float(sum(error.startswith(TOO_LONG) for error in errors)))
        if len(errors) > WARN_SHARE * len(grades):
            warnings.warn(
                f"the verifier reached no verdict on {len(errors)} of {len(grades)} completions, which count as "
                f"wrong; the first: {errors[0]}",
                stacklevel=2,
            )
        return [float(grade.answer_ok) for grade in grades]
