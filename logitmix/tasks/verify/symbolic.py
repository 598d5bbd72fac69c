"""Comparison by math-verify of answers that answers.py cannot parse. Runs in a worker of the pool.

`refusal` rejects answers that could keep sympy busy indefinitely, so that workers are rarely killed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from itertools import accumulate

MEMORY = 4 << 30  # bytes of address space; sympy needs a tenth of it
ORPHAN_SECONDS = 10  # the most processor time that a case may take


def refusal(answer: str) -> str | None:
    """Why an answer is kept from sympy, which would evaluate it without bounds; None if it is harmless."""
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
    if re.search(r"\\[lc]?dots|\.\.\.|…", answer):
        return "the answer leaves something out"  # math-verify drops the dots
    if max(accumulate((mark in "([{") - (mark in ")]}") for mark in answer), default=0) > 10:
        return "the answer's brackets are nested more than 10 deep"
    if not answer.isprintable():
        return "the answer holds control characters"
    return None


def _stacks_powers(answer: str) -> bool:
    """Whether an exponent contains a power. Brackets collapse from the inside: P contains a power, q does not."""
    text = answer.lower().replace("**", "^").replace(" ", "")
    collapsed = 1
    while collapsed:
        if re.search(r"\^[-+]?(?:P|\\[a-z]+q*P|(?:[0-9.]+|\\?[a-z]+)\^)", text):
            return True
        text, collapsed = re.subn(
            r"[({\[][^(){}\[\]]*[)}\]]", lambda group: "P" if re.search(r"[P^]", group[0]) else "q", text
        )
    return False


def compare(prediction: str, gold: str) -> tuple[bool, str | None]:
    """math-verify's verdict, and the error if it reached none. The pool enforces the time limit."""
    from math_verify import parse, verify

    try:
        parsed_gold, parsed_prediction = (
            parse(f"${text}$", parsing_timeout=None, raise_on_error=True) for text in (gold, prediction)
        )
        # Not symmetric, and the gold comes first.
        right = verify(parsed_gold, parsed_prediction, timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        return False, f"math-verify: {type(error).__name__}: {error}"[:200]
    return bool(right), None


def serve() -> None:
    """Answer each line of JSON, [prediction, gold], with a line of JSON, [right, error], until the input ends."""
    import resource

    import math_verify  # noqa: F401  # takes a second, before the time of the first case starts

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # ends a worker whose parent was killed during a case; otherwise the pool kills at its own limit
        used = resource.getrusage(resource.RUSAGE_SELF)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + ORPHAN_SECONDS, hard))
        print(json.dumps(compare(*json.loads(line))), file=replies, flush=True)
