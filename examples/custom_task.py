"""A task of your own, with its own template: how many days between two weekdays?

logitmix check-task custom_task.Weekdays                       # in this folder
logitmix train --task custom_task.Weekdays --model_name_or_path BASE --anchor SFT --output_dir run
"""

import random
from typing import ClassVar

from logitmix.tasks import Problem, Task, Template
from logitmix.tasks.base import Split, validate_request

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SIZES = {"train": 400, "validation": 40, "test": 40}

# The prompt, a perfect response, and what a format-correct response matches as a whole
DAYS_ONLY = Template(
    name="days_only",
    prompt_format="{question}\nThink it over, then write the number behind the word DAYS.\n",
    completion_format="{solution}\nDAYS {answer}",
    pattern=r"(?:(?!DAYS ).)*\nDAYS (?P<answer>\d+)\s*",
)


class Weekdays(Task):
    """Questions are drawn by a seed, so the splits never share one and nothing is downloaded."""

    name: ClassVar[str] = "weekdays"
    template: Template = DAYS_ONLY

    def __init__(self, seed: int = 0) -> None:
        pairs = [(day, count) for day in range(7) for count in range(80)]
        random.Random(seed).shuffle(pairs)
        self._splits: dict[str, list[tuple[int, int]]] = {}
        for split, size in SIZES.items():
            self._splits[split], pairs = pairs[:size], pairs[size:]

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        validate_request(split, limit)
        return [self._problem(*pair) for pair in self._splits[split][:limit]]

    def _problem(self, day: int, count: int) -> Problem:
        start, end = DAYS[day], DAYS[(day + count) % 7]
        weeks, rest = divmod(count, 7)
        question = (
            f"From a {start}, {weeks} full weeks pass, and then it is {end} within a week. How many days passed?"
        )
        return Problem(question, str(count), f"{weeks} weeks are {7 * weeks} days, and {rest} more to {end}.")
