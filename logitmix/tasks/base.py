"""What a task is: problems in three splits, a prompt, a demonstration for SFT, and a grader. Does not load torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from logitmix.tasks.rows import Message, open_question, open_text
from logitmix.tasks.templates import Prompt, Template
from logitmix.tasks.verify import Grade, grade

Verifier = Literal["strict", "lenient"]  # the rules of `Grade.lenient_ok`; `answer_ok` is always strict
Demonstrated = Literal["solution", "answer"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Problem:
    """A question, its gold answer (without a template), and a worked solution if there is one.

    `history` holds the messages before the question, as pairs of role and content. The fields may be given as a row
    of data holds them: a number, a list or dict of one value, and as the question a chat (`logitmix.tasks.rows`).

    Raises `ValueError` for values that are no text, such as NaN, lists of several values and bytes.
    """

    question: str
    answer: str
    solution: str | None = None
    history: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        question, earlier = open_question(self.question)
        opened = {"question": question, "answer": open_text(self.answer, f"answer to {question[:80]!r}")}
        if self.solution is not None:
            opened["solution"] = open_text(self.solution, f"solution of {question[:80]!r}")
        for name, value in (opened | {"history": (*self.history, *earlier)}).items():
            object.__setattr__(self, name, value)  # the class is frozen


class Task(ABC):
    """A source of problems, and the template that asks them and grades the answers.

    `load_task` constructs a task with the keyword `seed`, and with `data` if it is given. `chat_template_kwargs` are
    TRL's: arguments for the chat template that renders the prompts, such as `{"enable_thinking": False}`.
    """

    name: ClassVar[str]
    template: Template
    verifier: Verifier = "strict"
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems of a split (None: all), determined by the seed. Splits are disjoint."""

    @property
    def dropped(self) -> Mapping[str, Sequence[Problem]]:
        """Problems of the data that are in no split, by reason."""
        return {}

    @property
    def left_out(self) -> int:
        """The number of rows of the data that are not problems of this task."""
        return 0

    def prompt(self, problem: Problem) -> Prompt:
        """The prompt: a text that the model continues, or messages that it answers."""
        return self.template.prompt(problem.question, problem.history)

    def demonstration(self, problem: Problem) -> str:
        """The SFT target after the prompt: the solution, then the answer in the template.

        Raises `ValueError` for a problem without a solution.
        """
        if problem.solution is None:
            raise ValueError(
                f"the problem {problem.question[:80]!r} has no solution to demonstrate; give SFT data with solutions, "
                "or demonstrate answers"
            )
        return self.template.completion(problem.solution, problem.answer)

    def demonstrations(self, limit: int | None = None, demonstrate: Demonstrated = "solution") -> list[dict[str, Any]]:
        """The first training problems as SFT rows, in TRL's columns: `prompt` and `completion`.

        demonstrate: `"solution"` for the worked solution and the answer, `"answer"` for the answer alone

        Raises `ValueError` for more than there are.
        """
        problems = self.problems("train", limit)
        if limit is not None and limit > len(problems):
            raise ValueError(
                f"{limit} demonstrations are requested, but {self.name} has {len(problems)} training problems; "
                "lower train_limit"
            )
        if demonstrate == "answer":
            return [self.row(problem, self.template.answer_alone(problem.answer)) for problem in problems]
        return [self.row(problem, self.demonstration(problem)) for problem in problems]

    def grade(self, response: Prompt, problem: Problem) -> Grade:
        """Grade the response to a prompt, without its end-of-sequence token.

        TRL passes the completion of a chat as messages; the last one is graded.
        """
        text = response if isinstance(response, str) else response[-1]["content"]
        return grade(self.template.through_stop(text), problem.answer, self.template, self.verifier == "lenient")

    def row(self, problem: Problem, completion: str) -> dict[str, Any]:
        """A row for TRL's `SFTTrainer`: both columns are texts, or both are messages if the template is a chat.

        `chat_template_kwargs` are a third column, if there are any.
        """
        reply: Prompt = [{"role": "assistant", "content": completion}] if self.template.chat else completion
        row: dict[str, Any] = {"prompt": self.prompt(problem), "completion": reply}
        if self.chat_template_kwargs:
            row["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        return row


def validate_request(split: str, limit: int | None) -> None:
    """Raise `ValueError` for an unknown split, and for a limit that is no whole number from 1."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
    if limit is not None and not (isinstance(limit, Integral) and not isinstance(limit, bool)):
        raise ValueError(f"limit is {limit!r}, but must be a whole number, such as 10")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1; leave it out to get all of {split}")
