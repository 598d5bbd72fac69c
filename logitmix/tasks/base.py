"""What a task is: problems in three splits, a prompt, a demonstration for SFT, a grader. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from logitmix.tasks.templates import Prompt, Template
from logitmix.tasks.verify import Grade, grade

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (bare, without a template), and a worked solution where one exists."""

    question: str
    answer: str
    solution: str | None = None


class Task(ABC):
    """A source of problems, and the template in which they are asked, answered and graded.

    `load_task` constructs a task with the keyword `seed`, and with `data` where it is given.
    """

    name: ClassVar[str]
    template: Template

    @abstractmethod
    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems of a split (None: all). Same seed, same list; splits are disjoint."""

    @property
    def dropped(self) -> Mapping[str, Sequence[Problem]]:
        """Problems of the data that stand in no split, by the reason."""
        return {}

    @property
    def left_out(self) -> int:
        """How many rows of the data are no problem of this task."""
        return 0

    def prompt(self, problem: Problem) -> Prompt:
        """What the model is given; its response continues this text, or answers these messages."""
        return self.template.prompt(problem.question)

    def demonstration(self, problem: Problem) -> str:
        """What SFT teaches to write after the prompt: the solution, then the answer in the template."""
        if problem.solution is None:
            raise ValueError(
                f"the problem {problem.question[:80]!r} has no solution to demonstrate; give SFT data with solutions"
            )
        return self.template.completion(problem.solution, problem.answer)

    def demonstrations(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The first training problems as SFT rows, in TRL's columns: `prompt` and `completion`.

        Raises `ValueError` for more than exist.
        """
        problems = self.problems("train", limit)
        if limit is not None and limit > len(problems):
            raise ValueError(
                f"{limit} demonstrations are asked for, but {self.name} has {len(problems)} training problems; "
                "lower train_limit"
            )
        return [self.row(problem, self.demonstration(problem)) for problem in problems]

    def grade(self, response: Prompt, problem: Problem) -> Grade:
        """Grade what the model wrote after the prompt, its end-of-sequence token removed.

        TRL gives the completion of a chat as messages; the last one is graded.
        """
        text = response if isinstance(response, str) else response[-1]["content"]
        return grade(self.template.through_stop(text), problem.answer, self.template)

    def row(self, problem: Problem, completion: str) -> dict[str, Any]:
        """A row for TRL's `SFTTrainer`: both columns are texts, or both messages where the template is a chat."""
        reply: Prompt = [{"role": "assistant", "content": completion}] if self.template.chat else completion
        return {"prompt": self.prompt(problem), "completion": reply}


def check_request(split: str, limit: int | None) -> None:
    """Refuse a split that does not exist and a limit that would give nothing."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1; leave it out to get all of {split}")
