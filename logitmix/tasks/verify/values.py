r"""Formulas by value: exact on rationals, otherwise to 40 digits, at fixed points if there are variables.

Two formulas that agree to 25 digits wherever both are defined count as equal. There is no search: the work is bounded
by the length of the text and counted in steps, so that a verdict never depends on the machine.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache

from logitmix.tasks.verify.evaluation import (
    INTEGERS,
    MAX_STEPS,
    POINTS,
    Evaluation,
    TooLong,
    Undefined,
    Value,
    context,
    is_matrix,
    number,
)
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.trees import Node, has, symbols

DECIMAL = re.compile(r"-?(?:[0-9]+\.[0-9]*|\.[0-9]+)")
_local = threading.local()


def start_steps() -> None:
    """Begin to count the steps of a comparison."""
    _local.steps = 0


def _charge(steps: int) -> None:
    _local.steps = getattr(_local, "steps", 0) + steps
    if _local.steps > MAX_STEPS:
        raise TooLong(MAX_STEPS)


def equal(left: Node, right: Node) -> bool:
    """Whether two formulas are equal as functions of their variables. Raises `Unreadable` for what has no value."""
    if left == right:
        return True
    imaginary = has(left, "const", "i") or has(right, "const", "i")
    names = symbols(left) | symbols(right)
    last = len(POINTS) if names else 1
    defined = [0, 0]
    for points in (range(last), range(len(POINTS), len(POINTS) + len(INTEGERS) if names else 0)):
        agreed = 0
        for point in points:
            found = [value_at(side, point, imaginary) for side in (left, right)]
            defined = [count + (value is not None) for count, value in zip(defined, found, strict=True)]
            if all(value is not None for value in found):
                if not close(*found):
                    return False
                agreed += 1
        if agreed >= (2 if names else 1):
            return True
    if not any(defined):
        raise Unreadable("neither side has a value")
    return False


def ratio(left: Node, right: Node) -> Value | None:
    """The constant c with left = c * right everywhere, or None."""
    imaginary = has(left, "const", "i") or has(right, "const", "i")
    found: list[Value] = []
    for point in range(len(POINTS)):
        pair = [value_at(side, point, imaginary) for side in (left, right)]
        if any(value is None or is_matrix(value) for value in pair):
            continue
        if close(pair[1], Fraction(0)):
            return None
        found.append(number(pair[0]) / number(pair[1]))
        if not close(found[0], found[-1]):
            return None
    return None if len(found) < 2 or close(found[0], Fraction(0)) else found[0]


def constant(tree: Node) -> Value:
    """The value of a formula without variables. Raises `Unreadable` if it has some, or no value."""
    found = None if symbols(tree) else value_at(tree, 0, has(tree, "const", "i"))
    if found is None:
        raise Unreadable("not a number")
    return found


def value_at(tree: Node, point: int, imaginary: bool) -> Value | None:
    """The value at a point, None where it is undefined. Raises `Unreadable` for what is no number."""
    value, steps = _cached_value(tree, point, imaginary)
    _charge(steps)
    if isinstance(value, Unreadable):
        raise value
    return value


@lru_cache(maxsize=32768)
def _cached_value(tree: Node, point: int, imaginary: bool) -> tuple[Value | None, int]:
    """The value, and the steps it took, so that a cached value costs as much as a new one."""
    evaluation = Evaluation(point, imaginary)
    try:
        value = evaluation.of(tree)
        if not isinstance(value, Fraction) and not is_matrix(value) and not context().isfinite(value):
            value = None
    except (Undefined, ZeroDivisionError):
        value = None
    except (Unreadable, OverflowError) as error:
        return Unreadable(str(error)), evaluation.steps
    return value, evaluation.steps


def close(left: Value, right: Value) -> bool:
    """Whether two values are equal: exactly for two rationals, otherwise to 25 digits."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    if is_matrix(left) or is_matrix(right):
        shapes = [(side.rows, side.cols) if is_matrix(side) else None for side in (left, right)]
        return shapes[0] == shapes[1] and all(close(*pair) for pair in zip(left, right, strict=True))
    mp = context()
    left, right = number(left), number(right)
    size = max(abs(left), abs(right))
    # Against an exact 0, only the rounding error of the other side remains.
    bound = mp.mpf(10) ** -30 if min(abs(left), abs(right)) == 0 else size * mp.mpf(10) ** -25
    # An infinite side would make the bound infinite, and equal to everything.
    return bool(mp.isfinite(size) and abs(left - right) <= bound)


def rounded(decimal: str, exact: Value, digits_needed: int = 6) -> bool:
    """Whether a decimal is an exact value, rounded or truncated.

    It must have `digits_needed` significant digits or more; or as many decimal places, and four significant digits.
    """
    if not DECIMAL.fullmatch(decimal) or isinstance(exact, (context().mpc, context().matrix)):
        return False
    whole, _, digits = decimal.lstrip("-").partition(".")
    significant = len((whole + digits).lstrip("0"))
    if significant < digits_needed and (significant < 4 or len(digits) < digits_needed):
        return False
    mp, value = context(), number(exact)
    if (value < 0) != decimal.startswith("-"):
        return False
    scaled, written = abs(value) * mp.mpf(10) ** len(digits), int(whole + digits)
    return int(mp.floor(scaled)) == written or int(mp.floor(scaled + mp.mpf(1) / 2)) == written
