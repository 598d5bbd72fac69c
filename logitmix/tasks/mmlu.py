"""MMLU (Hendrycks et al. 2021): multiple choice in 57 subjects, answered by reasoning and a letter. MIT licence.

A raw record of the hub's `cais/mmlu`:

    {"question": "Find the order of the factor group Z_6/<3>.", "subject": "abstract_algebra",
     "choices": ["2", "3", "6", "12"], "answer": 1}

The task is generative: the model reasons and then writes a letter, and only the letter is compared. MMLU has no worked
solutions, so a demonstration names the right choice in one sentence before the letter. It teaches the format only.

Training problems are those of `dev` and `validation`, which are MMLU's own. Its `auxiliary_train` is not used: it
comes from other data sets (RACE, ARC, OpenBookQA).
"""

from __future__ import annotations

from numbers import Integral

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.rows import open_list
from logitmix.tasks.templates import R1

LETTERS = "ABCD"


class Mmlu(DataTask):
    """MMLU with its four choices written out below the question."""

    name = "mmlu"
    hub_id = "cais/mmlu"
    hub_config = "all"
    hub_train = "dev+validation"
    train_files = ("train*.jsonl", "dev*.jsonl", "val*.jsonl")
    columns = ("question", "choices", "answer")
    answer_hint = "its answer must be the index of one of its four choices, from 0 to 3"
    template = R1

    def problem(self, row: Row) -> Problem:
        choices, index = [text(choice, "choice") for choice in open_list(row["choices"], "choices")], row["answer"]
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        question = "\n".join(
            [text(row["question"], "question"), *lines, "Answer with the letter of the right choice."]
        )
        is_index = isinstance(index, Integral) and not isinstance(index, bool) and index in range(len(LETTERS))
        if len(choices) != len(LETTERS) or not is_index:
            return Problem(question, "")
        return Problem(question, LETTERS[index], f"The right choice is {LETTERS[index]}: {choices[index]}")
