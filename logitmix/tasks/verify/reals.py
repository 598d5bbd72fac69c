r"""Sets of real numbers: intervals, their unions and differences, and the inequalities that describe them.

Two sets are equal if they agree at all of their ends, between these, and beyond them; the ends of an inequality are
the roots of its sides, which are polynomials up to degree 2, also inside absolute values.

Accepted as one set: `0<x\le 1`, `x\in(0,1]` and `(0,1]`; `|x|<2`, `x^2<4` and `(-2,2)`; `x\ne 0` and
`(-\infty,0)\cup(0,\infty)`; `(0,1)\cup[1,2)` and `(0,2)`. Refused: `x>3` and `y>3`, `[0,1]` and `(0,1)`, `(0,\infty]`.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from logitmix.tasks.verify.evaluation import Value, context, number
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.trees import STRUCTURES, Node, has, substitute, symbols
from logitmix.tasks.verify.values import close, value_at

FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}
_INFINITE: dict[Node, int] = {("inf",): 1, ("neg", ("inf",)): -1}
_SETS = ("∪", "∩", "\\setminus")


def describes_set(tree: Node) -> bool:
    """Whether an answer can only mean a set of numbers; a pair (1, 2) may be a point."""
    if tree[0] == "rel":
        return tree[1] == ("∈",) or _is_inequality(tree)
    if tree[0] == "list":
        solved = [part for part in tree[2] if part[0] == "rel" and (_is_inequality(part) or part[1] == ("=",))]
        return len(solved) == len(tree[2]) and any(map(_is_inequality, solved))
    return tree[0] in _SETS or tree[0] == "numbers"


def same_reals(left: Node, right: Node) -> bool:
    """Whether two sets are equal; if both name their variable, it must be the same.

    Raises `Unreadable` if one of them is no such set.
    """
    names = _variable(left), _variable(right)
    if names[0] and names[1] and names[0] != names[1]:
        return False
    free = symbols(left) - {names[0]}, symbols(right) - {names[1]}
    if free[0] != free[1]:
        return False
    for point in range(3 if free[0] else 1):
        sides = _Reals(left, point), _Reals(right, point)
        if any(sides[0].holds(sample) != sides[1].holds(sample) for sample in _samples(sides[0].ends + sides[1].ends)):
            return False
    return True


class _Reals:
    """A set of real numbers, with other variables at one of the fixed points."""

    def __init__(self, tree: Node, point: int) -> None:
        self.tree, self.point = tree, point
        self.ends = self._ends(tree)

    def holds(self, sample: Value) -> bool:
        return self._holds(self.tree, sample)

    def _at(self, tree: Node) -> Value:
        value = value_at(tree[2][0] if tree[0] == "unit" else tree, self.point, imaginary=False)
        if value is None or isinstance(value, (context().mpc, context().matrix)):
            raise Unreadable("an end that is no real number")
        return value

    def _ends(self, tree: Node) -> list[Value]:
        kind, name = tree[0], _variable(tree)
        if kind == "numbers" and tree[1] == "R":
            return []
        if kind == "tuple" and len(tree[2]) == 2 and tree[1] != "::":
            infinite = [_INFINITE.get(part, 0) for part in tree[2]]
            if (
                infinite[0] > 0
                or infinite[1] < 0
                or (infinite[0] and tree[1][0] == "[")
                or (infinite[1] and tree[1][1] == "]")
            ):
                raise Unreadable("an infinite end that is in the set")
            return [self._at(part) for part, side in zip(tree[2], infinite, strict=True) if not side]
        if kind == "set":
            return [self._at(part) for part in tree[2]]
        if kind == "rel" and tree[1] == ("∈",):
            return self._ends(tree[2][1])
        if kind == "rel" and all(operator in FLIPPED for operator in tree[1]):
            return [root for pair in pairwise(tree[2]) for root in self._roots(("-", *map(_bare, pair)), name)]
        if kind in _SETS or (kind == "list" and describes_set(tree)):
            return [end for part in tree[2] for end in self._ends(part)]
        raise Unreadable("not a set of real numbers")

    def _roots(self, tree: Node, name: str) -> list[Value]:
        """The roots of a polynomial of degree 1 or 2 in a variable, for either sign of each absolute value in it.

        Raises `Unreadable` for any other formula.
        """
        if (part := _first_abs(tree)) is not None:
            variants = [_replaced(tree, part, inner) for inner in (part[2], ("neg", part[2]))]
            return [root for variant in variants for root in self._roots(variant, name)]
        if has(tree, "inf") or name not in symbols(tree):
            return []
        values = {x: number(self._at(substitute(tree, name, ("num", Fraction(x))))) for x in (0, 1, 2, 3, 5, -7)}
        square = (values[2] - 2 * values[1] + values[0]) / 2
        slope = values[1] - values[0] - square
        if not all(close(value, square * x * x + slope * x + values[0]) for x, value in values.items()):
            raise Unreadable("an inequality that is not quadratic")
        if close(square, Fraction(0)):
            return [] if close(slope, Fraction(0)) else [-values[0] / slope]
        root = slope * slope - 4 * square * values[0]
        return [(-slope + sign * context().sqrt(root)) / (2 * square) for sign in (1, -1)] if root >= 0 else []

    def _holds(self, tree: Node, sample: Value) -> bool:
        kind, parts = tree[0], tree[-1]
        if kind == "numbers":
            return True
        if kind == "tuple":
            low = -1 if parts[0] in _INFINITE else _order(self._at(parts[0]), sample)
            high = -1 if parts[1] in _INFINITE else _order(sample, self._at(parts[1]))
            return low < (tree[1][0] == "[") and high < (tree[1][1] == "]")
        if kind == "set":
            return any(_order(self._at(part), sample) == 0 for part in parts)
        if kind == "rel" and tree[1] == ("∈",):
            return self._holds(parts[1], sample)
        if kind == "rel":
            name = _variable(tree)
            values = [
                _INFINITE[part] * context().inf
                if part in _INFINITE
                else self._at(substitute(_bare(part), name, ("sample", number(sample))))
                for part in parts
            ]
            return all(
                _ordered(_order(*pair), operator) for pair, operator in zip(pairwise(values), tree[1], strict=True)
            )
        found = [self._holds(part, sample) for part in parts]
        if kind == "\\setminus":
            return found[0] and not found[1]
        return any(found) if kind == "∪" or (kind == "list" and self._joins(tree) == "or") else all(found)

    def _joins(self, tree: Node) -> str:
        """What joins inequalities. A comma says neither "and" nor "or": what makes sense is meant."""
        if tree[1].lstrip("\\l") in ("or", "and"):
            return str(tree[1].lstrip("\\l"))
        found = [[self._holds(part, sample) for part in tree[2]] for sample in _samples(self._ends(tree))]
        if all(map(any, found)):
            return "and"
        if any(map(all, found)):
            raise Unreadable("a comma between inequalities may mean both")
        return "or"


def _is_inequality(tree: Node) -> bool:
    return tree[0] == "rel" and all(operator in "<>≤≥≠" for operator in tree[1])


def _bare(tree: Node) -> Node:
    if tree[0] in STRUCTURES and tree[0] != "unit":
        raise Unreadable("an inequality of what is no number")
    return tree[2][0] if tree[0] == "unit" else tree  # type: ignore[no-any-return]


def _variable(tree: Node) -> str:
    """The variable that an answer names, in an inequality the one that it is about; empty if it names none."""
    if tree[0] == "list":
        names = {_variable(part) for part in tree[2]}
        if len(names) > 1:
            raise Unreadable("inequalities in several variables")
        return names.pop()
    if tree[0] != "rel":
        return ""
    if tree[1] == ("∈",):
        if tree[2][0][0] not in ("sym", "name"):
            raise Unreadable("a member that is no variable")
        return str(tree[2][0][1])
    if tree[2][-2][0] == "sym" and all(part[0] == "sym" for part in tree[2][-1:] + tree[2][:-2]):
        return str(tree[2][-2][1])  # x in x > a and in a < x < b
    alone = [part[1] for part in tree[2] if part[0] == "sym"]
    others = frozenset().union(*(symbols(part) for part in tree[2] if part[0] != "sym"))
    names = {*others, *alone}
    if len(names) == 1 or (len(alone) == 1 and alone[0] not in others):
        return str(next(iter(names)) if len(names) == 1 else alone[0])
    raise Unreadable("an inequality in several variables")


def _samples(ends: list[Value]) -> list[Value]:
    """The ends, one number between each two, and one beyond them on each side."""
    distinct: list[Value] = []
    for end in sorted(ends, key=number):
        if not distinct or not close(distinct[-1], end):
            distinct.append(end)
    if not distinct:
        return [Fraction(0)]
    middles = [(number(one) + number(other)) / 2 for one, other in pairwise(distinct)]
    return [*distinct, *middles, number(distinct[0]) - 1, number(distinct[-1]) + 1]


def _order(left: Value, right: Value) -> int:
    """-1, 0 or 1, as the left number is below, at or above the right one."""
    finite = all(isinstance(side, Fraction) or context().isfinite(side) for side in (left, right))
    if finite and close(left, right):
        return 0
    return -1 if number(left) < number(right) else 1


def _ordered(order: int, operator: str) -> bool:
    return order in {"<": (-1,), ">": (1,), "≤": (-1, 0), "≥": (0, 1), "=": (0,), "≠": (-1, 1)}[operator]


def _first_abs(tree: Node) -> Node | None:
    if tree[:2] == ("call", "abs"):
        return tree
    return next((found for part in tree[1:] if isinstance(part, tuple) and (found := _first_abs(part))), None)


def _replaced(tree: Node, part: Node, by: Node) -> Node:
    if tree == part:
        return by
    return tuple(_replaced(node, part, by) if isinstance(node, tuple) else node for node in tree)
