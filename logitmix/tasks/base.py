"""What a task is: problems in three splits, a prompt, a demonstration for SFT, a grader. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from logitmix.tasks.templates import Template
from logitmix.tasks.verify import Grade, grade

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (bare, without a template), and a worked solution where one exists."""

    question: str
    answer: str
    solution: str | None = None


class Task(ABC):
    """A source of problems, and the template in which they are asked, answered and graded."""

    name: ClassVar[str]
    template: ClassVar[Template]

    @abstractmethod
    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems of a split (None: all). Same seed, same list; splits are disjoint."""

    def prompt(self, problem: Problem) -> str:
        """What the model is given; its response continues this text."""
        return self.template.prompt(problem.question)

    def demonstration(self, problem: Problem) -> str:
        """What SFT teaches to write after the prompt: the solution, then the answer in the template."""
        if problem.solution is None:
            raise ValueError(
                f"the problem {problem.question[:80]!r} has no solution to demonstrate; give SFT data with solutions"
            )
        return self.template.completion(problem.solution, problem.answer)

    def demonstrations(self, limit: int | None = None) -> list[dict[str, str]]:
        """The first training problems as SFT rows, in TRL's columns: `prompt` and `completion`."""
        return [
            {"prompt": self.prompt(problem), "completion": self.demonstration(problem)}
            for problem in self.problems("train", limit)
        ]

    def grade(self, response: str, problem: Problem) -> Grade:
        """Grade what the model wrote after the prompt, its end-of-sequence token removed."""
        return grade(response, problem.answer, self.template)


def check_request(split: str, limit: int | None) -> None:
    """Refuse a split that does not exist and a limit that would give nothing."""
    if split not in get_args(Split):
        raise ValueError(f"there is no split {split!r}; use one of {', '.join(get_args(Split))}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1; leave it out to get all of {split}")
