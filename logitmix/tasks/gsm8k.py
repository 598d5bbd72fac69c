"""GSM8K (Cobbe et al. 2021): school word problems with solutions in sentences. MIT licence.

A raw record of the hub's `openai/gsm8k`:

    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much
                  did she earn?",
     "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\\nWorking 50 minutes, she earned 0.2 x 50 =
                $<<0.2*50=10>>10.\\n#### 10"}

The gold follows `####`. The solution is the text before it, without the `<<...>>` calls of the authors' calculator.
"""

from __future__ import annotations

import re

from logitmix.tasks.base import Problem
from logitmix.tasks.data import DataTask, Row, text
from logitmix.tasks.templates import R1


class Gsm8k(DataTask):
    """GSM8K, in the paper's template."""

    name = "gsm8k"
    hub_id = "openai/gsm8k"
    hub_config = "main"
    columns = ("question", "answer")
    answer_hint = "its column 'answer' must end in '#### ' and a number"
    template = R1

    def problem(self, row: Row) -> Problem:
        solution, _, answer = text(row["answer"], "answer").rpartition("####")
        return Problem(
            text(row["question"], "question"), answer.strip() if solution else "", _without_calculator(solution)
        )


def _without_calculator(solution: str) -> str:
    return re.sub(r"<<.*?>>", "", solution).strip()
