r"""Grading: is the answer in the required format, and is it right?

A response is untrusted text. Equal strings and plain numbers are decided here, exactly; the rest goes to
math-verify, after `_refusal` has turned away what could hang sympy: math-verify's timeouts are signals, which
fire only in the main thread, and never inside one long integer operation.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from logitmix.tasks.templates import Template, last_boxed

MAX_LENGTH = 500  # characters; the longest gold of MATH has 159
TIMEOUT_SECONDS = 2  # for each of math-verify's two parses and its comparison; main thread only


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    format_ok:   the answer stands in the required template
    answer_ok:   format_ok and the answer is right; the reward
    lenient_ok:  right wherever an answer can be found; reported beside answer_ok, never a reward
    answer:      the text that was compared, None where none was found
    error:       why the comparison did not come to a verdict; such an answer counts as wrong
    """

    format_ok: bool
    answer_ok: bool
    lenient_ok: bool
    answer: str | None
    error: str | None


def grade(response: str, gold: str, template: Template) -> Grade:
    """Grade what the model wrote after the prompt against the gold answer."""
    strict = template.extract(response)
    answer = strict if strict is not None else _find_answer(response)
    if answer is None:
        return Grade(format_ok=False, answer_ok=False, lenient_ok=False, answer=None, error=None)
    right, error = _compare(answer, gold)
    formatted = strict is not None
    return Grade(formatted, answer_ok=formatted and right, lenient_ok=right, answer=answer, error=error)


def answers_match(prediction: str, gold: str) -> bool:
    r"""Whether two answer strings mean the same; the prediction is untrusted, the gold is not.

    >>> answers_match("1/2", r"\frac{1}{2}"), answers_match("$1,000$", "1000"), answers_match("2", "3")
    (True, True, False)
    """
    return _compare(prediction, gold)[0]


def normalise(answer: str) -> str:
    r"""Take away what changes an answer's looks and not its meaning: `$`, `\left`, thin spaces, `\dfrac`."""
    text = answer.replace("\\$", "").replace("$", "").replace("{,}", ",").strip().removesuffix(".")
    boxed = last_boxed(text)
    if boxed and text == f"\\boxed{{{boxed}}}":
        text = boxed
    text = re.sub(r"(?<!\\)\\[!,;:]", "", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    # A blank stays only where it keeps two words, or two numbers, apart.
    text = re.sub(r" (?!\w)|(?<!\w) ", "", re.sub(r"\s+", " ", text))
    words = re.fullmatch(r"\\(?:text|mbox|textbf|mathrm)\{([^{}]*)\}", text)
    return words[1].strip() if words else text


def _find_answer(response: str) -> str | None:
    """The likeliest answer of a response outside the format: last answer block, last box, last number."""
    blocks = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", response, re.DOTALL)
    if blocks and blocks[-1].strip():
        return str(blocks[-1]).strip()
    if boxed := last_boxed(response):
        return boxed
    numbers = re.findall(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?", response)
    return str(numbers[-1]) if numbers else None


def _compare(prediction: str, gold: str) -> tuple[bool, str | None]:
    """Whether the answers match, and what kept the comparison from a verdict."""
    if len(prediction) > MAX_LENGTH:
        return False, f"the answer has {len(prediction)} characters; at most {MAX_LENGTH} are compared"
    left, right = normalise(prediction), normalise(gold)
    if left == right:
        return bool(left), None
    numbers = _number(left), _number(right)
    if None not in numbers:
        return numbers[0] == numbers[1], None
    if _is_words(left) and _is_words(right):
        return left.casefold() == right.casefold(), None
    if refusal := _refusal(left):
        return False, refusal
    return _compare_by_math_verify(left, right)


def _number(text: str) -> Fraction | None:
    """The value of a plain decimal number, its thousands perhaps grouped by commas."""
    if re.fullmatch(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?", text) and text.strip("+-"):
        return Fraction(text.replace(",", ""))
    return None


def _is_words(text: str) -> bool:
    """Words, not a formula; math-verify would read them as products of letters, equal to their anagrams."""
    return re.fullmatch(r"[A-Za-z ]{3,}", text) is not None


def _refusal(answer: str) -> str | None:
    """Why an answer is kept from sympy, which would evaluate it without bounds; None where it is harmless."""
    exponents = "".join(re.findall(r"(?:\^|\*\*)\s*\{?\s*[-+]?([0-9]{2,})", answer))
    if len(exponents) > 5:
        return "the answer's exponents are too large to evaluate"
    if _stacks_powers(answer):
        return "the answer stacks powers on powers"
    if len(re.findall(r"[)}\]]\s*(?:\^|\*\*)", answer)) > 5:
        return "the answer raises too many brackets to powers"
    if re.search(r"[!)}\]]\s*!|[0-9]{4,}\s*!|\\(?:d|t)?binom", answer):
        return "the answer holds a factorial or binomial that is not evaluated"
    if re.search(r"\\(?:i+nt|oint|sum|prod|lim)(?![a-z])", answer):
        return "the answer holds an integral, sum, product or limit that is not evaluated"
    if _depth(answer) > 10:
        return "the answer's brackets are nested more than 10 deep"
    if not answer.isprintable():
        return "the answer holds control characters"
    return None


def _stacks_powers(answer: str) -> bool:
    """Whether an exponent is a power or holds one. Brackets collapse inside out: P holds a power, q none."""
    text = answer.lower().replace("**", "^").replace(" ", "")
    collapsed = 1
    while collapsed:
        if re.search(r"\^[-+]?(?:P|\\[a-z]+q*P|(?:[0-9.]+|\\?[a-z]+)\^)", text):
            return True
        text, collapsed = re.subn(
            r"[({\[][^(){}\[\]]*[)}\]]", lambda group: "P" if re.search(r"[P^]", group[0]) else "q", text
        )
    return False


def _depth(text: str) -> int:
    return max(accumulate((character in "([{") - (character in ")]}") for character in text), default=0)


def _compare_by_math_verify(prediction: str, gold: str) -> tuple[bool, str | None]:
    from math_verify import parse, verify  # sympy takes a second to import: only when needed
    from math_verify.errors import TimeoutException  # a BaseException

    seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        parsed_gold, parsed_prediction = (
            parse(f"${text}$", parsing_timeout=seconds, raise_on_error=True) for text in (gold, prediction)
        )
        # Not symmetric, and the gold comes first.
        right = verify(parsed_gold, parsed_prediction, timeout_seconds=seconds, raise_on_error=True)
    except (Exception, TimeoutException) as error:
        return False, f"math-verify: {type(error).__name__}: {error}"[:200]
    return bool(right), None
