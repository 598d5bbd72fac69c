r"""Grades a response: whether its answer is in the required format, and whether it is right.

A response is untrusted text. A closed grammar reads answers; an answer that it does not read equals only its own text.
All work is bounded by the length of the text and counted in steps, not seconds. docs/verifier.md lists the decisions
on which public graders disagree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from logitmix.tasks.templates import Template, last_boxed
from logitmix.tasks.verify.answers import read
from logitmix.tasks.verify.choices import is_choice
from logitmix.tasks.verify.compare import Comparison
from logitmix.tasks.verify.evaluation import TooLong
from logitmix.tasks.verify.tokens import Unreadable, text_of, tokenize
from logitmix.tasks.verify.values import start_steps

MAX_LENGTH = 500  # characters of an answer; the longest gold of MATH has 159
MAX_TEXT = 20_000  # characters of the text that is searched for an answer
_PROSE = re.compile(r"(?:[A-Za-z,.:'!\s$]|\\[\[\](),;: ]|\\text\{[^{}0-9\\]*\}|\\\\)*", re.DOTALL)
_HEDGE = re.compile(
    r"(?<![a-zA-Z])(?:not|no|or|either|wrong|instead|maybe|perhaps|never|except)(?![a-zA-Z])", re.IGNORECASE
)


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


def grade(response: str, gold: str, template: Template, lenient: bool = False) -> Grade:
    """Grade a response to a prompt against the gold answer. `lenient` widens the rules for `lenient_ok` only."""
    strict = template.extract(response)
    answer = strict if strict is not None else _find_answer(response)
    if answer is None:
        return Grade(format_ok=False, answer_ok=False, lenient_ok=False, answer=None, error=None)
    right, error = compare(answer, gold, Comparison())
    loosely = right or (lenient and compare(answer, gold, Comparison(lenient=True))[0])
    formatted = strict is not None
    return Grade(formatted, answer_ok=formatted and right, lenient_ok=loosely, answer=answer, error=error)


def extract_answer(response: str, template: Template) -> str | None:
    """The text of the answer if the response is format-correct, else None."""
    return template.extract(response)


def answers_match(prediction: str, gold: str, lenient: bool = False) -> bool:
    r"""Whether two answers mean the same. The prediction is untrusted, the gold is trusted.

    >>> answers_match("1/2", r"\frac{1}{2}"), answers_match("$1,000$", "1000"), answers_match("2", "3")
    (True, True, False)
    >>> answers_match(r"180^\circ", r"\pi"), answers_match(r"180^\circ", r"\pi", lenient=True)
    (False, True)
    """
    return compare(prediction, gold, Comparison(lenient))[0]


def unread(answer: str) -> str | None:
    """Why the grammar does not read an answer, which then equals only its own text; None if it reads it."""
    if len(answer) > MAX_LENGTH:
        return f"it has {len(answer)} characters; at most {MAX_LENGTH} are read"
    tokens = tokenize(opened(answer))
    try:
        read(tuple(tokens))
    except Unreadable as error:
        return None if is_choice(text_of(tokens)) else str(error)
    return None


def _find_answer(response: str) -> str | None:
    """The most likely answer of a response outside the format: its last answer block, last box or last number."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    if blocks and blocks[-1].strip():
        return str(blocks[-1]).strip()
    if boxed := last_boxed(response):
        return boxed
    numbers = re.findall(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", response)
    return str(numbers[-1]) if numbers else None


def compare(prediction: str, gold: str, comparison: Comparison) -> tuple[bool, str | None]:
    """Whether the answers match, and the error if the comparison reached no verdict."""
    if prediction.strip() == gold.strip():
        return re.search(r"[^\s.,;:$]", gold) is not None, None
    if len(prediction) > MAX_LENGTH and not (len(prediction) <= MAX_TEXT and last_boxed(prediction)):
        return False, f"the answer has {len(prediction)} characters; at most {MAX_LENGTH} are compared"
    start_steps()
    try:
        left = opened(prediction)
        if len(left) > MAX_LENGTH:
            return False, f"the answer has {len(left)} characters; at most {MAX_LENGTH} are compared"
        verdict = comparison.same_tokens(tokenize(left), tokenize(opened(gold)))
    except TooLong as error:
        return False, str(error)
    except Exception as error:  # an error of the verifier must not end a training run; the log counts it
        return False, f"{type(error).__name__}: {error}"[:200]
    return verdict, None if verdict else comparison.unread


def opened(text: str) -> str:
    r"""The content of the box if prose or an equation leads to it; else the text, in which a box is a bracket.

    >>> opened(r"so we get $x=\boxed{5}$."), opened(r"\boxed{5}+7")
    ('5', '\\boxed{5}+7')
    """
    while "\\boxed" in text or "\\fbox" in text:
        text = text.replace("\\fbox", "\\boxed")
        boxes = _boxes(text)
        if not boxes:
            return text
        rest = "".join(
            text[end:start] for (_, end), (start, _) in zip([(0, 0), *boxes], [*boxes, (len(text), 0)], strict=True)
        )
        contents = [unbox_one(text[start:end]) for start, end in boxes]
        before = text[: boxes[0][0]].rstrip(" $({")
        after = text[boxes[-1][1] :]
        closed = re.fullmatch(r"[\s$.)}]*|\\[\])]\.?|", after) is not None
        if (_HEDGE.search(rest) and len(boxes) == 1) or not closed:
            return text
        if len(boxes) > 1:
            if not _PROSE.fullmatch(rest) or _HEDGE.search(rest.replace(" or ", " ")):
                return text
            text = ", ".join(dict.fromkeys(contents))
        elif _PROSE.fullmatch(before) or (
            before.endswith(("=", ":", "≈", "is")) and not re.search(r"[;,]|\\text", before)
        ):
            text = contents[0]
        else:
            return text
    return text


def unbox_one(box: str) -> str:
    """The content of a text that is one box."""
    return box[box.index("{") + 1 : -1].strip()


def _boxes(text: str) -> list[tuple[int, int]]:
    """The outermost boxes with matching braces: where they begin and end."""
    found, place = [], 0
    while (start := text.find("\\boxed", place)) >= 0:
        opening = re.compile(r"\\boxed\s*\{").match(text, start)
        if not opening:
            return []
        depth, end = 1, opening.end()
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:
            return []
        found.append((start, end))
        place = end
    return found
