r"""The value of a formula at a point: an exact Fraction if it can be, otherwise a number of mpmath with 40 digits.

Large values are refused before they are computed, and steps are counted: the work never depends on the machine.
"""

from __future__ import annotations

import threading
import zlib
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, gcd, lcm
from typing import Any

from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.trees import Node

MAX_STEPS = 20_000  # evaluated nodes per comparison
MAX_TERMS = 1000
TOO_LONG = "the comparison takes more than"
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
INTEGERS = (1, 2, 5, 8, 11)  # where n! or (-1)^n is defined; these follow POINTS
Value = Any  # a Fraction, or mpmath's mpf, mpc or matrix


class Undefined(Exception):
    """The formula has no real value at this point."""


class TooLong(Exception):
    """The comparison takes more steps than its limit. The message begins with TOO_LONG."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{TOO_LONG} {limit:,} steps")


_local = threading.local()


def context() -> Any:
    """mpmath at 40 digits, one context per thread, as its functions change the precision while they run."""
    if not hasattr(_local, "mp"):
        from mpmath.ctx_mp import MPContext  # takes 0.1 s, so only when first needed

        _local.mp = MPContext()  # type: ignore[no-untyped-call]
        _local.mp.dps = 40
    return _local.mp


def number(value: Value) -> Value:
    """A value as mpmath's number."""
    mp = context()
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


@lru_cache(maxsize=8192)
def _variable(name: str, point: int) -> Value:
    """The value of a variable: its name decides, so that it does not depend on the other answer."""
    mp, code = context(), zlib.crc32(name.encode("utf-8", "replace"))
    if point >= len(POINTS):
        return Fraction(INTEGERS[point - len(POINTS)] + code % 7)
    base, step = POINTS[point]
    share = mp.sqrt(code + 2) % 1  # irrational, so that variables are independent
    return mp.mpf(base) + mp.mpf(step) * share


class Evaluation:
    """The value of a tree at one point. `imaginary` allows complex numbers.

    Raises `Undefined` where the formula has no value, `Unreadable` for what is no number, and `TooLong`.
    """

    def __init__(self, point: int, imaginary: bool) -> None:
        self.point, self.imaginary = point, imaginary
        self.steps = 0
        self.bound: dict[str, Value] = {}  # the index of a sum or limit

    def of(self, tree: Node) -> Value:
        self.charge(1)
        mp, kind = context(), tree[0]
        if kind in ("num", "sample"):
            return tree[1]
        if kind in ("sym", "const") and tree[1] in self.bound:  # also an index i
            return self.bound[tree[1]]
        if kind == "sym":
            return _variable(tree[1], self.point)
        if kind == "const":
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[tree[1]]
        if kind == "matrix":
            return mp.matrix([[number(self.of(cell)) for cell in row] for row in tree[1]])
        if kind in ("sum", "prod"):
            return self.series(*tree)
        if kind == "lim":
            return self.limit(*tree[1:])
        if kind == "call":
            return self.call(tree[1], [self.of(part) for part in tree[2:]])
        if kind == "apply":
            return self.apply(tree[1], [self.of(part) for part in tree[2:]])
        if kind not in ("+", "-", "*", "/", "^", "neg", "deg"):
            raise Unreadable("it is not a number")
        values = [self.of(part) for part in tree[1:]]
        if any(map(is_matrix, values)):
            return _matrix_operation(kind, values)
        if kind == "^":
            return self.power(*values)
        if len(values) == 1:
            return -values[0] if kind == "neg" else values[0]
        return _operation(kind, *values)

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TooLong(MAX_STEPS)

    def power(self, base: Value, exponent: Value) -> Value:
        mp = context()
        if base == 0:
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Undefined("a power of 0")
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            size = abs(exponent.numerator)
            if isinstance(base, Fraction) and size * _bits(base) <= 20_000:
                self.charge(size * _bits(base) // 100)
                return base**exponent.numerator
        base_number, exponent_number = number(base), number(exponent)
        if abs(exponent_number * mp.log(abs(base_number))) > 100_000:
            raise Unreadable("the number is too large")
        negative = not isinstance(base_number, mp.mpc) and base_number < 0
        if negative and not self.imaginary:
            if not isinstance(exponent, Fraction) or exponent.denominator % 2 == 0:
                raise Undefined("an even root of a negative number")
            root = (-base_number) ** exponent_number
            return -root if exponent.numerator % 2 else root
        return mp.mpc(base_number) ** exponent_number if negative else base_number**exponent_number

    def call(self, name: str, parts: list[Value]) -> Value:
        mp, first = context(), parts[0]
        if name == "det":
            if not is_matrix(first) or first.rows != first.cols:
                raise Unreadable("a determinant of what is no square matrix")
            return mp.det(first)
        if any(map(is_matrix, parts)):
            raise Unreadable(f"{name} of a matrix")
        if name in _COUNTS:
            return self.count(name, parts)
        if name in ("floor", "ceil"):
            exact = first if isinstance(first, Fraction) else Fraction(int(mp.floor(mp.re(first) * 10**30)), 10**30)
            return Fraction(exact.__floor__() if name == "floor" else exact.__ceil__())
        if name == "abs":
            return abs(first)
        if name in ("max", "min"):
            if any(isinstance(part, mp.mpc) for part in parts):
                raise Undefined("complex numbers have no order")
            return (max if name == "max" else min)(parts, key=number)
        if name in ("sqrt", "cbrt"):
            return self.power(first, Fraction(1, 2 if name == "sqrt" else 3))
        arguments = [number(part) for part in parts]
        self.charge(4)
        if abs(arguments[0]) > mp.mpf(10) ** 1000:
            raise Unreadable("the number is too large")
        if name in ("exp", "sinh", "cosh", "tanh") and abs(arguments[0]) > 100_000:
            raise Unreadable("the number is too large")
        try:
            found = mp.log(arguments[0]) / mp.log(arguments[1]) if name == "log" else getattr(mp, name)(arguments[0])
        except (ValueError, ZeroDivisionError) as error:
            raise Undefined(str(error)) from error
        if not mp.isfinite(found):
            raise Undefined("infinite")
        if isinstance(found, mp.mpc) and not self.imaginary:
            raise Undefined("not real")
        return found

    def count(self, name: str, parts: list[Value]) -> Value:
        """Factorials and other functions of integers."""
        mp, first = context(), parts[0]
        exact = all(isinstance(part, Fraction) and part.denominator == 1 for part in parts)
        whole = [int(part) for part in parts] if exact else []
        if name in ("gcd", "lcm", "mod"):
            if not exact or (name == "mod" and whole[1] == 0):
                raise Undefined(f"{name} of what is no integer")
            return Fraction(whole[0] % whole[1] if name == "mod" else (gcd if name == "gcd" else lcm)(*whole))
        if exact and min(whole) >= 0 and max(whole) <= 3000:
            self.charge(max(whole) // 10)
            return Fraction(factorial(whole[0]) if name == "!" else comb(*whole))
        if exact or max(abs(number(part)) for part in parts) > 100:
            raise Unreadable("the factorial or binomial is too large")
        return mp.gamma(number(first) + 1) if name == "!" else mp.binomial(*(number(part) for part in parts))

    def apply(self, name: str, parts: list[Value]) -> Value:
        """An unknown function f: any fixed one will do if f(2x), 2f(x) and f(x+1) are unrelated."""
        if any(map(is_matrix, parts)):
            raise Unreadable(f"{name} of a matrix")
        total = _variable(f"{name}()", 0)
        for place, part in enumerate(parts):
            value, slope = number(part), _variable(f"{name}({place})", 1)
            total += slope * value**3 + _variable(f"{name}({place})", 2) * value / (value**2 + 7)
        return total

    def series(self, kind: str, name: str, start: Node, end: Node, body: Node) -> Value:
        first, last = self.of(start), self.of(end)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (first, last)):
            raise Unreadable(f"\\{kind} has no integer bounds")
        if last - first >= MAX_TERMS:
            raise Unreadable(f"\\{kind} has more than {MAX_TERMS} terms")
        outer, total = self.bound, Fraction(kind == "prod")
        for index in range(int(first), int(last) + 1):
            self.bound = {**outer, name: Fraction(index)}
            total = _operation("+" if kind == "sum" else "*", total, self.of(body))
        self.bound = outer
        return total

    def limit(self, name: str, point: Node, side: str, body: Node) -> Value:
        """A limit: the value of the body at distances of 1e-80 and 1e-81 from the point, which must agree.

        Where the point is infinite, at 1e80 and 1e81.
        """
        mp, outer, found = context(), self.bound, []
        infinite = point == ("inf",) or point == ("neg", ("inf",))
        if side not in ("", "+", "-"):
            raise Unreadable(f"a limit from {side!r}")
        mp.dps = 300
        try:
            centre = None if infinite else number(self.of(point))
            for exponent in (80, 81):
                step = mp.mpf(10) ** -exponent
                steps = (
                    [1 / step if point == ("inf",) else -1 / step]
                    if infinite
                    else [step] * (side != "-") + [-step] * (side != "+")
                )
                for shift in steps:
                    self.bound = {**outer, name: shift if infinite else centre + shift}
                    found.append(number(self.of(body)))
        finally:
            mp.dps = 40
            self.bound = outer
        if any(map(is_matrix, found)) or not all(
            abs(found[0] - value) < mp.mpf(10) ** -32 * max(1, abs(found[0])) for value in found
        ):
            raise Unreadable("the limit is not reached")
        return +found[0]


_COUNTS = frozenset({"!", "binom", "gcd", "lcm", "mod"})


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def is_matrix(value: Value) -> bool:
    return isinstance(value, context().matrix)


def _operation(kind: str, left: Value, right: Value) -> Value:
    if is_matrix(left) or is_matrix(right):
        return _matrix_operation(kind, [left, right])
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)) or _bits(left) + _bits(right) > 60_000:
        left, right = number(left), number(right)
    if kind == "+":
        return left + right
    if kind == "-":
        return left - right
    if kind == "*":
        return left * right
    if right == 0:
        raise Undefined("division by 0")
    return left / right


def _matrix_operation(kind: str, values: list[Value]) -> Value:
    """Sums, products, multiples and small powers of matrices, as far as their shapes fit."""
    left, right = values[0], values[-1]
    both = is_matrix(left) and is_matrix(right)
    try:
        if kind == "neg":
            return -left
        if kind in ("+", "-") and both:
            return left + right if kind == "+" else left - right
        if kind == "*":
            return number(left) * number(right)
        if kind == "/" and not is_matrix(right) and right != 0:
            return left / number(right)
        if kind == "^" and isinstance(right, Fraction) and right.denominator == 1 and 1 <= right <= 20:
            return left ** int(right)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    raise Unreadable("an operation that matrices do not have")
