r"""MATH (Hendrycks et al. 2021): competition problems with human solutions. MIT licence.

A raw record of the hub's `Maxwell-Jia/MATH`:

    {"problem": "Compute $\\dbinom{5}{3}$.", "level": "Level 2", "type": "Counting & Probability",
     "solution": "$\\dbinom{5}{3} = \\dfrac{5!}{3!2!} = \\boxed{10}.$"}

The gold is the last box of the solution, or the column `answer` where there is one (MATH-500 has it).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from logitmix.tasks.base import Problem, Split, Task, check_request
from logitmix.tasks.templates import R1, last_boxed

HUB_ID = "Maxwell-Jia/MATH"
HELD_OUT = 500
# The two training solutions that end in an empty box; both prove choice (A), which is 0.
ERRATA = {
    "For any integer $n>1$, the number of prime numbers greater than $n!+1$": "0",
    "You are given a sequence of $58$ terms; each term has the form $P+n$": "0",
}


class HendrycksMath(Task):
    """MATH from the hub, or from `data`: a folder with `train*.jsonl` and `test*.jsonl`, or one JSONL file.

    Validation is carved out of train by the seed: 500 problems, or a tenth where train is small. From one
    file, test is carved out in the same way. A training question that also stands in test is dropped.
    """

    name = "hendrycks_math"
    template = R1

    def __init__(self, data: str | Path | None = None, seed: int = 0) -> None:
        self.data = None if data is None else Path(data)
        self.seed = seed
        if self.data is not None and not self.data.exists():
            raise ValueError(
                f"{self.data} does not exist; give a folder with train*.jsonl and test*.jsonl, or one JSONL "
                f"file, or leave data out to download {HUB_ID}"
            )

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        check_request(split, limit)
        problems = self._splits[split]
        if not problems:
            raise ValueError(f"the {split} split of {self.data or HUB_ID} is empty; give data with more problems")
        return problems[:limit]

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        if self.data is not None and self.data.is_file():
            train, test = self._carve(_read_file(self.data))
        else:
            test = self._read("test")
            test_questions = {problem.question for problem in test}
            train = [problem for problem in self._read("train") if problem.question not in test_questions]
        train, validation = self._carve(train)
        return {"train": train, "validation": validation, "test": test}

    def _carve(self, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """What stays, in the data's order, and what the seed holds out."""
        size = min(HELD_OUT, len(problems) // 10)
        held_out = set(random.Random(f"{self.seed}/{self.name}").sample(range(len(problems)), size))
        stay = [problem for index, problem in enumerate(problems) if index not in held_out]
        return stay, [problems[index] for index in sorted(held_out)]

    def _read(self, part: str) -> list[Problem]:
        if self.data is None:
            return _read_hub(part)
        files = sorted(self.data.glob(f"{part}*.jsonl"))
        if not files:
            raise ValueError(f"{self.data} holds no {part}*.jsonl; it needs train*.jsonl and test*.jsonl")
        return [problem for file in files for problem in _read_file(file)]


def _read_hub(part: str) -> list[Problem]:
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB_ID, split=part)
    except OSError as error:  # ConnectionError is one
        raise ValueError(
            f"{HUB_ID} could not be downloaded ({error}); either connect to the network and try again, "
            "or give data=, a folder with train*.jsonl and test*.jsonl"
        ) from error
    return _problems(rows, HUB_ID)


def _read_file(path: Path) -> list[Problem]:
    with path.open(encoding="utf-8") as lines:
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not JSON lines ({error}); write one JSON object per line") from error
    return _problems(rows, str(path))


def _problems(rows: Iterable[Mapping[str, Any]], source: str) -> list[Problem]:
    """Rows as problems, each question once."""
    problems: dict[str, Problem] = {}
    for number, row in enumerate(rows, start=1):
        for column in ("problem", "solution"):
            if column not in row:
                raise ValueError(
                    f"row {number} of {source} has no column {column!r}, only {', '.join(map(repr, row))}; "
                    "rename the one that is meant"
                )
        question, solution = row["problem"].strip(), row["solution"].strip()
        answer = row.get("answer") or last_boxed(solution) or _erratum(question)
        if not answer:
            raise ValueError(
                f"row {number} of {source} has no answer; give it a column 'answer', or a \\boxed{{...}} in "
                "its solution"
            )
        problem = Problem(question, str(answer).strip(), solution or None)
        problems.setdefault(problem.question, problem)
    if not problems:
        raise ValueError(f"{source} holds no problems; give data with at least one row")
    return list(problems.values())


def _erratum(question: str) -> str | None:
    return next((gold for start, gold in ERRATA.items() if question.startswith(start)), None)
