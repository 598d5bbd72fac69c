"""Tasks whose problems are rows of data, read from the hub or from local files and split by a seed."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from logitmix.tasks.base import Problem, Split, Task, validate_request
from logitmix.tasks.duplicates import near_duplicates
from logitmix.tasks.rows import open_text

HELD_OUT = 500

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Data:
    """The splits, the problems that are in none of them, and the number of rows that are not problems."""

    splits: dict[Split, list[Problem]]
    dropped: dict[str, list[Problem]]
    left_out: int


class DataTask(Task):
    """A task that only defines how a row becomes a problem.

    hub_id, hub_config:   the data set on the Hugging Face hub
    hub_train, hub_test:  its splits; if hub_test is None, test is taken from train
    train_files:          patterns of local files with the rows of hub_train; those of test are in `test*.jsonl`
    columns:              the columns that a row must have

    `data` is a folder with such files, or one JSONL file, to read instead of the hub. The seed takes validation from
    train: 500 problems, or a tenth if train is small; and test in the same way if the data has none. Splits are
    disjoint: a repeated question is kept once, in test if it occurs there, and near-duplicates of test problems are
    dropped from the other splits. `dropped` holds the dropped problems, and `left_out` counts the rows that are not
    problems of this task.

    Raises `ValueError` for data that does not exist or cannot be read, for a row that cannot be a problem, and for an
    empty split.
    """

    hub_id: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    hub_train: ClassVar[str] = "train"
    hub_test: ClassVar[str | None] = "test"
    train_files: ClassVar[tuple[str, ...]] = ("train*.jsonl",)
    columns: tuple[str, ...]
    answer_hint: ClassVar[str] = "correct the row, or leave it out"

    def __init__(self, data: str | Path | None = None, seed: int = 0) -> None:
        self.data = None if data is None else Path(data)
        self.seed = seed
        self._left_out = 0
        if self.data is not None and not self.data.exists():
            alternative = f", or leave data out to download {self.hub_id}" if self.hub_id else ""
            raise ValueError(f"{self.data} does not exist; give {self._wanted_files()}{alternative}")
        if self.data is None and self.hub_id is None:
            raise ValueError(f"the task {self.name!r} reads your own data; give data (--data), {self._wanted_files()}")

    @abstractmethod
    def problem(self, row: Row) -> Problem | None:
        """The problem in a row, which has all `columns`; None leaves the row out."""

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        validate_request(split, limit)
        problems = self._data.splits[split]
        if not problems:
            raise ValueError(f"the {split} split of {self._source} is empty; give data with more problems")
        return problems[:limit]

    @property
    def dropped(self) -> Mapping[str, list[Problem]]:
        return self._data.dropped

    @property
    def left_out(self) -> int:
        return self._data.left_out

    @property
    def _source(self) -> str:
        return str(self.data or self.hub_id)

    @cached_property
    def _data(self) -> _Data:
        everything, test = self._read()
        train, repeats = _deduplicate(everything)
        if test is None:
            train, test = self._hold_out(train)
        else:
            test, test_repeats = _deduplicate(test)
            test_questions = {_asked(problem) for problem in test}
            repeats += test_repeats + [problem for problem in train if _asked(problem) in test_questions]
            train = [problem for problem in train if _asked(problem) not in test_questions]
        near = [problem for problem, _ in near_duplicates(train, test)]
        dropped = set(near)
        train, validation = self._hold_out(train)
        train, validation = ([p for p in part if p not in dropped] for part in (train, validation))
        if not train:
            raise ValueError(
                f"the train split of {self._source} is empty: all of its problems are also in test; give other data"
            )
        return _Data(
            {"train": train, "validation": validation, "test": test},
            {"repeats": repeats, "near-duplicates of test": near},
            self._left_out,
        )

    def _hold_out(self, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """The remaining problems in the data's order, and those that the seed selects."""
        size = min(HELD_OUT, len(problems) // 10)
        held_out = set(random.Random(f"{self.seed}/{self.name}").sample(range(len(problems)), size))
        remaining = [problem for index, problem in enumerate(problems) if index not in held_out]
        return remaining, [problems[index] for index in sorted(held_out)]

    def _read(self) -> tuple[list[Problem], list[Problem] | None]:
        """All training problems, and the test problems if the data has a test split."""
        if self.data is None:
            test = None if self.hub_test is None else self._problems(*self._read_hub(self.hub_test))
            return self._problems(*self._read_hub(self.hub_train)), test
        if self.data.is_file():
            return self._problems(_read_file(self.data), str(self.data)), None
        files = {path for pattern in self.train_files for path in self.data.glob(pattern)}
        test_files = sorted(self.data.glob("test*.jsonl"))
        if not files:
            raise ValueError(f"{self.data} holds no {' or '.join(self.train_files)}; give {self._wanted_files()}")
        train = [p for file in sorted(files) for p in self._problems(_read_file(file), str(file))]
        return train, [p for file in test_files for p in self._problems(_read_file(file), str(file))] or None

    def _read_hub(self, split: str) -> tuple[Iterable[Row], str]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.hub_id, self.hub_config, split=split)
        except OSError as error:  # includes ConnectionError
            raise ValueError(
                f"{self.hub_id} could not be downloaded ({error}); either connect to the network and try again, "
                f"or give data (--data), {self._wanted_files()}"
            ) from error
        return rows, f"{self.hub_id}, {split}"

    def _problems(self, rows: Iterable[Row], source: str) -> list[Problem]:
        problems = []
        for number, row in enumerate(rows, start=1):
            for column in self.columns:
                if column not in row:
                    raise ValueError(
                        f"row {number} of {source} has no column {column!r}, only {', '.join(map(repr, row))}; "
                        "rename the column that holds it"
                    )
            try:
                problem = self.problem(row)
                if problem is None:
                    self._left_out += 1
                    continue
                self._validate(problem)
            except ValueError as error:
                raise ValueError(f"row {number} of {source} cannot be a problem: {error}") from error
            problems.append(problem)
        if not problems:
            raise ValueError(f"{source} holds no problems; give data with at least one row")
        return problems

    def _validate(self, problem: Problem) -> None:
        """Raise `ValueError` where the problem lacks a text, or the template cannot ask it or hold its answer."""
        if not problem.question:
            raise ValueError("it has no question; correct the row, or leave it out")
        if not problem.answer:
            raise ValueError(f"it has no answer; {self.answer_hint}")
        self.prompt(problem)
        self.template.completion(problem.solution or "", problem.answer)

    def _wanted_files(self) -> str:
        return f"a folder with {' or '.join(self.train_files)} and test*.jsonl, or one JSONL file"


def text(value: Any, name: str = "value") -> str:
    """A cell as stripped text; empty for a missing value. Raises `ValueError` as `open_text`."""
    return open_text(value, name).strip()


def _asked(problem: Problem) -> tuple[Any, ...]:
    """What tells a problem from others: its question, after its messages."""
    return (*problem.history, problem.question)


def _deduplicate(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """The first problem with each question, and the repeats."""
    first: dict[Any, Problem] = {}
    repeats = [problem for problem in problems if first.setdefault(_asked(problem), problem) is not problem]
    return list(first.values()), repeats


def _read_file(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not JSON lines ({error}); write one JSON object per line") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is not a JSON object; write one JSON object per line")
    return rows
