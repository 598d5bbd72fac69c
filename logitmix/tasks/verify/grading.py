r"""Grades a response: whether its answer is in the required format, and whether it is right.

A response is untrusted text. Most answers (numbers, formulas, lists, intervals) are decided here, in bounded time. The
rest goes to math-verify in a pool of worker processes, which are killed after 2 seconds. docs/verifier.md lists the
decisions on which public graders disagree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from logitmix.tasks.templates import Template, last_boxed
from logitmix.tasks.verify.compare import same
from logitmix.tasks.verify.normalise import normalise
from logitmix.tasks.verify.pool import shared_pool
from logitmix.tasks.verify.symbolic import refusal

MAX_LENGTH = 500  # characters of an answer; the longest gold of MATH has 159
MAX_TEXT = 20_000  # characters of the text that is searched for an answer
# Text of which math-verify would compare only the part that fits: words, numbers side by side, labels, open
# environments, two answers with an arrow, a bar or a stray sign between them.
MISREAD = re.compile(
    r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}|[0-9] [0-9]|[a-zA-Z][0-9]|[a-zA-Z]\.|\\approx|\\begin\{(?:array|cases)|[^\x00-\x7f]"
    r"|[?@#]|\^$|[0-9]\|+[0-9_]|\\[|&]|^(?!.*\\begin).*(?:&|\\\\)"
    r"|\\(?:to|implies|iff|(?:[Ll]ong)?(?:[Ll]eft)?[Rr]ightarrow|hspace|underbrace|underset|overset|tag)(?![a-zA-Z])"
)

__all__ = ["Grade", "answers_match", "extract_answer", "grade", "normalise"]


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    format_ok:   the answer is in the required format
    answer_ok:   format_ok and the answer is right; the reward
    lenient_ok:  a right answer is found anywhere in the text; reported, never a reward
    answer:      the text that was compared, or None if no answer was found
    error:       why the comparison reached no verdict; such an answer counts as wrong
    """

    format_ok: bool
    answer_ok: bool
    lenient_ok: bool
    answer: str | None
    error: str | None


def grade(response: str, gold: str, template: Template) -> Grade:
    """Grade a response to a prompt against the gold answer."""
    strict = template.extract(response)
    answer = strict if strict is not None else _find_answer(response)
    if answer is None:
        return Grade(format_ok=False, answer_ok=False, lenient_ok=False, answer=None, error=None)
    right, error = _compare(answer, gold)
    formatted = strict is not None
    return Grade(formatted, answer_ok=formatted and right, lenient_ok=right, answer=answer, error=error)


def extract_answer(response: str, template: Template) -> str | None:
    """The text of the answer if the response is format-correct, else None."""
    return template.extract(response)


def answers_match(prediction: str, gold: str) -> bool:
    r"""Whether two answers mean the same. The prediction is untrusted, the gold is trusted.

    >>> answers_match("1/2", r"\frac{1}{2}"), answers_match("$1,000$", "1000"), answers_match("2", "3")
    (True, True, False)
    """
    return _compare(prediction, gold)[0]


def _find_answer(response: str) -> str | None:
    """The most likely answer of a response outside the format: its last answer block, last box or last number."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    if blocks and blocks[-1].strip():
        return str(blocks[-1]).strip()
    if boxed := last_boxed(response):
        return boxed
    numbers = re.findall(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", response)
    return str(numbers[-1]) if numbers else None


def _compare(prediction: str, gold: str) -> tuple[bool, str | None]:
    """Whether the answers match, and the error if the comparison reached no verdict."""
    if prediction.strip() == gold.strip():
        return bool(normalise(gold)) if len(gold) <= MAX_TEXT else True, None
    if len(prediction) > MAX_LENGTH and not (len(prediction) <= MAX_TEXT and last_boxed(prediction)):
        return False, f"the answer has {len(prediction)} characters; at most {MAX_LENGTH} are compared"
    try:
        left, right = normalise(prediction), normalise(gold)
        if len(left) > MAX_LENGTH:
            return False, f"the answer has {len(left)} characters; at most {MAX_LENGTH} are compared"
        verdict = same(left, right)
    except Exception as error:  # an error of the verifier must not end a training run; the log counts it
        return False, f"{type(error).__name__}: {error}"[:200]
    if verdict is not None:
        return verdict, None
    if reason := refusal(left):
        return False, reason
    if MISREAD.search(left):
        return False, None
    return shared_pool().compare(left, right)
