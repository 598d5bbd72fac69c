r"""Equality of formulas by value.

Equality is decided by evaluation, exact on rationals and otherwise to 40 digits, at fixed points if there are
variables. Two formulas that agree to 25 digits at all points count as equal. Without simplification there is no
search: the work is bounded by the length of the text, and large values are refused before they are computed.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from math import comb, factorial
from typing import Any

from logitmix.tasks.verify.formulas import Node, constants, parse, symbols
from logitmix.tasks.verify.tokens import Unreadable

# Fixed, so that a verdict never depends on chance, and unrelated, so that no identity holds at them by accident.
POINTS = (
    ("0.3141", "0.4177"),
    ("0.7313", "0.1039"),
    ("1.6179", "0.5413"),
    ("2.2361", "0.8369"),
    ("-1.2977", "0.6791"),
    ("-0.4621", "0.3313"),
    ("3.7417", "-0.9257"),
)

DECIMAL = re.compile(r"-?(?:[0-9]+\.[0-9]*|\.[0-9]+)")
SCIENTIFIC = re.compile(rf"({DECIMAL.pattern})(?:\*10\^\{{(-?[0-9]{{1,2}})\}})?")


class Undefined(Exception):
    """The formula has no real value at this point."""


def equal(left: str, right: str) -> bool | None:
    """Whether two normalised formulas are equal as functions of their variables; None if one cannot be parsed."""
    try:
        trees = parse(left), parse(right)
    except Unreadable:
        return None
    names = sorted(symbols(trees[0]) | symbols(trees[1]))
    agreed, defined = 0, [0, 0]
    for values in _environments(names, complex_numbers="i" in constants(trees[0]) | constants(trees[1])):
        found: list[Any] = []
        for side, tree in enumerate(trees):
            try:
                found.append(evaluate(tree, values))
                defined[side] += 1
            except Undefined:
                pass
            except Unreadable:
                return None
        if len(found) == 2:
            if not close(*found):
                return False
            agreed += 1
    if agreed >= min(2, 1 + len(names)):
        return True
    return None if all(defined) or not any(defined) else False


def ratio(left: str, right: str) -> Any:
    """The constant c with left = c * right everywhere, or None."""
    trees = parse(left), parse(right)
    names = sorted(symbols(trees[0]) | symbols(trees[1]))
    found: list[Any] = []
    for values in _environments(names, complex_numbers="i" in constants(trees[0]) | constants(trees[1])):
        try:
            pair = evaluate(trees[0], values), evaluate(trees[1], values)
        except Undefined:
            continue
        if close(pair[1], Fraction(0)):
            return None
        found.append(_number(pair[0]) / _number(pair[1]))
    if len(found) < 2 or close(found[0], Fraction(0)) or not all(close(found[0], other) for other in found[1:]):
        return None
    return found[0]


def value(text: str) -> Any:
    """The value of a formula without variables: a Fraction if it is rational, else to 40 digits."""
    tree = parse(text)
    if symbols(tree):
        raise Unreadable("it has variables")
    return evaluate(tree, next(iter(_environments([], complex_numbers="i" in constants(tree)))))


def rounded(decimal: str, exact: Any, other: str) -> bool:
    """Whether a decimal is an exact value rounded or truncated to six digits or more."""
    if not DECIMAL.fullmatch(decimal) or DECIMAL.fullmatch(other):
        return False
    whole, _, digits = decimal.lstrip("-").partition(".")
    significant = len((whole + digits).lstrip("0"))
    if significant < 4 or (significant < 6 and len(digits) < 6):
        return False
    mp = context()
    number = mp.mpf(exact.numerator) / exact.denominator if isinstance(exact, Fraction) else exact
    if isinstance(number, mp.mpc) or (number < 0) != decimal.startswith("-"):
        return False
    scaled, written = abs(number) * mp.mpf(10) ** len(digits), int(whole + digits)
    return int(mp.floor(scaled)) == written or int(mp.floor(scaled + mp.mpf(1) / 2)) == written


def close(left: Any, right: Any) -> bool:
    """Whether two values are equal: exactly for two rationals, otherwise to 25 digits."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    mp = context()
    left, right = _number(left), _number(right)
    size = max(abs(left), abs(right))
    # Against an exact 0, only the rounding error of the other side remains.
    bound = mp.mpf(10) ** -30 if min(abs(left), abs(right)) == 0 else size * mp.mpf(10) ** -25
    # An infinite side would make the bound infinite, and equal to everything.
    return bool(mp.isfinite(size) and abs(left - right) <= bound)


_local = threading.local()


def context() -> Any:
    """mpmath at 40 digits, one context per thread, as its functions change the precision while they run."""
    if not hasattr(_local, "mp"):
        from mpmath.ctx_mp import MPContext  # takes 0.1 s, so only when first needed

        _local.mp = MPContext()  # type: ignore[no-untyped-call]
        _local.mp.dps = 40
    return _local.mp


def _environments(names: list[str], complex_numbers: bool) -> list[dict[str, Any]]:
    mp = context()
    points = POINTS if names else POINTS[:1]
    environments: list[dict[str, Any]] = []
    for base, step in points:
        values: dict[str, Any] = {"": complex_numbers}
        for index, name in enumerate(names):
            # The square root keeps the variables algebraically independent.
            values[name] = mp.mpf(base) + mp.mpf(step) * (mp.sqrt(index + 2) - 1 if index else 0)
        environments.append(values)
    return environments


def _number(number: Any) -> Any:
    mp = context()
    return mp.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


def evaluate(tree: Node, values: dict[str, Any]) -> Any:
    """The value of a formula; `values` has its variables, and under `""` whether complex numbers are allowed."""
    mp, kind = context(), tree[0]
    if kind == "number":
        return tree[1]
    if kind == "symbol":
        return values[tree[1]]
    if kind == "constant":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[tree[1]]
    parts = [evaluate(part, values) for part in tree[1:] if isinstance(part, tuple)]
    if kind == "power":
        return _power(parts[0], parts[1], bool(values[""]))
    if kind == "call":
        return _call(tree[1], parts, bool(values[""]))
    left, right = parts[0], parts[-1]
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = _number(left), _number(right)
    if kind == "+":
        return left + right
    if kind == "-":
        return -left if len(parts) == 1 else left - right
    if kind == "*":
        return left * right
    if right == 0:
        raise Undefined("division by 0")
    return left / right


def _power(base: Any, exponent: Any, complex_numbers: bool) -> Any:
    mp = context()
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise Undefined("a power of 0")
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = abs(exponent.numerator)
        if isinstance(base, Fraction) and size * max(base.numerator, base.denominator, key=abs).bit_length() <= 20_000:
            return base**exponent.numerator
    base_number, exponent_number = _number(base), _number(exponent)
    if abs(exponent_number * mp.log(abs(base_number))) > 100_000:
        raise Unreadable("the number is too large")
    negative = not isinstance(base_number, mp.mpc) and base_number < 0
    if negative and not complex_numbers:
        if not isinstance(exponent, Fraction) or exponent.denominator % 2 == 0:
            raise Undefined("an even root of a negative number")
        root = (-base_number) ** exponent_number
        return -root if exponent.numerator % 2 else root
    return mp.mpc(base_number) ** exponent_number if negative else base_number**exponent_number


def _call(name: str, parts: list[Any], complex_numbers: bool) -> Any:
    mp = context()
    exact = all(isinstance(part, Fraction) and part.denominator == 1 for part in parts)
    first = parts[0]
    if name == "!":
        if exact and 0 <= first <= 3000:
            return Fraction(factorial(int(first)))
        if exact or abs(first) > 100:
            raise Unreadable("the factorial is too large")
        return mp.gamma(_number(first) + 1)
    if name == "binom":
        if exact and 0 <= parts[1] <= parts[0] <= 3000:
            return Fraction(comb(int(parts[0]), int(parts[1])))
        if exact or max(abs(_number(part)) for part in parts) > 100:
            raise Unreadable("the binomial is too large")
        return mp.binomial(_number(parts[0]), _number(parts[1]))
    if name in ("floor", "ceil"):
        number = first if isinstance(first, Fraction) else Fraction(int(mp.floor(mp.re(first) * 10**30)), 10**30)
        return Fraction(number.__floor__() if name == "floor" else number.__ceil__())
    if name == "abs":
        return abs(first)
    if name in ("max", "min"):
        if any(isinstance(part, mp.mpc) for part in parts):
            raise Undefined("complex numbers have no order")
        return (max if name == "max" else min)(parts, key=_number)
    arguments = [_number(part) for part in parts]
    if name in ("exp", "sinh", "cosh", "tanh") and abs(arguments[0]) > 100_000:
        raise Unreadable("the number is too large")
    try:
        found = mp.log(arguments[0]) / mp.log(arguments[1]) if name == "log" else getattr(mp, name)(arguments[0])
    except (ValueError, ZeroDivisionError) as error:
        raise Undefined(str(error)) from error
    if not mp.isfinite(found):
        raise Undefined("infinite")
    if isinstance(found, mp.mpc) and not complex_numbers:
        raise Undefined("not real")
    return found
