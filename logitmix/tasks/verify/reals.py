r"""Sets of real numbers: intervals, their unions and differences, and the inequalities that describe them.

Accepted as one set: `0<x\le 1`, `x\in(0,1]` and `(0,1]`; `|x|<2` and `(-2,2)`; `x\ne 0`, `\mathbb{R}\setminus\{0\}` and
`(-\infty,0)\cup(0,\infty)`; `(0,1)\cup[1,2)` and `(0,2)`. Refused: `x>3` and `y>3`, `[0,1]` and `(0,1)`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from logitmix.tasks.verify.formulas import STRUCTURES, Node, has, substitute, symbols
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.values import Undefined, Value, close, constant, context, equal, number

INFINITY: Node = ("inf",)
MINUS_INFINITY: Node = ("neg", INFINITY)
FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠"}
ORDER = frozenset("< > ≤ ≥ ≠".split())


class Piece(NamedTuple):
    """An interval, or a point if both ends are the same."""

    low: Node
    low_in: bool
    high: Node
    high_in: bool


class Reals(NamedTuple):
    """Disjoint pieces in ascending order, and the variable that the answer named, if it did."""

    pieces: tuple[Piece, ...]
    variable: str = ""


EVERYTHING = Piece(MINUS_INFINITY, False, INFINITY, False)


def describes_set(tree: Node) -> bool:
    """Whether an answer can only mean a set of numbers; a pair (1, 2) may be a point."""
    if tree[0] == "rel":
        return all(operator in ORDER for operator in tree[1]) or tree[1] == ("∈",)
    if tree[0] == "list":
        return all(part[0] == "rel" and all(operator in ORDER for operator in part[1]) for part in tree[2])
    return tree[0] in ("∪", "∩", "\\setminus", "numbers")


def as_reals(tree: Node) -> Reals | None:
    """The set of real numbers that an answer describes; None if it describes none."""
    try:
        return _as_reals(tree)
    except (Unreadable, Undefined):
        return None


def same_reals(left: Reals, right: Reals) -> bool:
    """Whether two sets are equal; if both name their variable, it must be the same."""
    if left.variable and right.variable and left.variable != right.variable:
        return False
    if len(left.pieces) != len(right.pieces):
        return False
    rest = list(right.pieces)
    for piece in left.pieces:
        match = next((other for other in rest if _same_piece(piece, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _as_reals(tree: Node) -> Reals | None:
    kind = tree[0]
    if kind == "numbers":
        return Reals((EVERYTHING,)) if tree[1] == "R" else None
    if kind == "tuple" and len(tree[2]) == 2 and tree[1] != "::":
        low_in, high_in = tree[1][0] == "[", tree[1][1] == "]"
        if any(part[0] in STRUCTURES for part in tree[2]):
            return None
        return _canonical([Piece(tree[2][0], low_in, tree[2][1], high_in)])
    if kind == "set":
        if any(part[0] in STRUCTURES for part in tree[2]):
            return None
        return _canonical([Piece(part, True, part, True) for part in tree[2]])
    if kind == "rel" and tree[1] == ("∈",):
        inner = _as_reals(tree[2][1])
        return inner and inner._replace(variable=str(tree[2][0][1])) if tree[2][0][0] in ("sym", "name") else None
    if kind == "rel":
        return _solved(tree)
    if kind in ("∪", "∩", "\\setminus"):
        sides = [_as_reals(part) for part in tree[2]]
        return _combined(kind, sides[0], sides[1]) if sides[0] and sides[1] else None
    if kind == "list":
        sides = [_as_reals(part) if part[0] == "rel" else None for part in tree[2]]
        if None in sides or len({side.variable for side in sides if side}) != 1:
            return None
        found = [side for side in sides if side]
        total = found[0]
        for side in found[1:]:
            total = _combined(_joined(tree[1], total, side), total, side)
        return total
    return None


def _joined(joiner: str, left: Reals, right: Reals) -> str:
    """How a list joins inequalities. A comma says neither "and" nor "or": what makes sense is meant."""
    if joiner in ("\\or", "\\lor"):
        return "∪"
    if joiner in ("\\and", "\\land"):
        return "∩"
    if _combined("∪", left, right).pieces == (EVERYTHING,):
        return "∩"
    if not _combined("∩", left, right).pieces:
        return "∪"
    raise Unreadable("a comma between inequalities may mean both")


def _combined(kind: str, left: Reals, right: Reals) -> Reals:
    variable = left.variable or right.variable
    if kind == "∪":
        return _canonical([*left.pieces, *right.pieces], variable)
    others = right.pieces if kind == "∩" else _complement(right)
    return _canonical([_meet(one, other) for one in left.pieces for other in others], variable)


def _complement(reals: Reals) -> tuple[Piece, ...]:
    found, low, low_in = [], MINUS_INFINITY, False
    for piece in reals.pieces:
        found.append(Piece(low, low_in, piece.low, not piece.low_in))
        low, low_in = piece.high, not piece.high_in
    return (*found, Piece(low, low_in, INFINITY, False))


def _meet(one: Piece, other: Piece) -> Piece:
    low, low_in = max(((p.low, p.low_in) for p in (one, other)), key=lambda end: (_at(end[0]), not end[1]))
    high, high_in = min(((p.high, p.high_in) for p in (one, other)), key=lambda end: (_at(end[0]), end[1]))
    return Piece(low, low_in, high, high_in)


def _canonical(pieces: list[Piece], variable: str = "") -> Reals:
    """Sort and join pieces. A single piece may have ends with variables."""
    ends = [end for piece in pieces for end in (piece.low, piece.high)]
    if any(symbols(end) for end in ends):
        return Reals(tuple(pieces), variable)
    found: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (_at(piece.low), not piece.low_in)):
        low, high = _at(piece.low), _at(piece.high)
        if low > high or (_same_end(piece.low, piece.high) and not (piece.low_in and piece.high_in)):
            continue
        last = found[-1] if found else None
        if last and (_at(last.high) > low or (_same_end(last.high, piece.low) and (last.high_in or piece.low_in))):
            if _same_end(last.high, piece.high):
                found[-1] = last._replace(high_in=last.high_in or piece.high_in)
            elif high > _at(last.high):
                found[-1] = last._replace(high=piece.high, high_in=piece.high_in)
        else:
            found.append(piece)
    return Reals(tuple(found), variable)


def _at(end: Node) -> Value:
    mp = context()
    if end in (INFINITY, MINUS_INFINITY):
        return mp.inf if end == INFINITY else -mp.inf
    value = constant(end[2][0] if end[0] == "unit" else end)
    if isinstance(value, (tuple, mp.mpc)):
        raise Unreadable("an end of an interval is no real number")
    return number(value)


def _same_end(one: Node, other: Node) -> bool:
    if has(one, "inf") or has(other, "inf"):
        return one == other
    return symbols(one) == symbols(other) and equal(one, other)


def _same_piece(one: Piece, other: Piece) -> bool:
    return (
        (one.low_in, one.high_in) == (other.low_in, other.high_in)
        and _same_end(one.low, other.low)
        and _same_end(one.high, other.high)
    )


def _solved(relation: Node) -> Reals | None:
    """The solutions of an inequality in one variable, as far as it is linear or an absolute value of that."""
    operators, parts = relation[1], relation[2]
    if any(operator not in ORDER for operator in operators) or any(part[0] in STRUCTURES for part in parts):
        return None
    if len(operators) == 2 and "≠" not in operators:
        if (operators[0] in "<≤") != (operators[1] in "<≤"):
            return None
        if operators[0] in ">≥":
            operators, parts = tuple(FLIPPED[operator] for operator in reversed(operators)), parts[::-1]
        variable = _variable_of(parts[1], parts[0], parts[2])
        sides = [_half(parts[1], FLIPPED[operators[0]], parts[0], variable), _half(parts[1], operators[1], parts[2], variable)]
        if parts[1] == ("sym", variable):
            return _canonical([Piece(parts[0], operators[0] == "≤", parts[2], operators[1] == "≤")], variable)
        return _combined("∩", Reals((sides[0],), variable), Reals((sides[1],), variable))
    if len(operators) != 1:
        return None
    operator, left, right = operators[0], parts[0], parts[1]
    if right[:2] == ("call", "abs") or (left[0] != "sym" and right[0] == "sym" and not symbols(left)):
        operator, left, right = FLIPPED[operator], right, left
    if left[:2] == ("call", "abs"):
        variable = _variable_of(left[2], right)
        if operator == "≠" or not _at(right) > 0:
            return None
        above, below = _half(left[2], operator, right, variable), _half(left[2], FLIPPED[operator], ("neg", right), variable)
        return _combined("∩" if operator in "<≤" else "∪", Reals((above,), variable), Reals((below,), variable))
    variable = _variable_of(left, right)
    if operator == "≠":
        point = _half(left, "<", right, variable)
        bound = point.high if point.high != INFINITY else point.low
        return _canonical([Piece(MINUS_INFINITY, False, bound, False), Piece(bound, False, INFINITY, False)], variable)
    return _canonical([_half(left, operator, right, variable)], variable)


def _variable_of(side: Node, *others: Node) -> str:
    """The variable that an inequality is solved for."""
    around = frozenset().union(*(symbols(other) for other in others))
    if side[0] == "sym" and side[1] not in around:
        if any(other[0] == "sym" for other in others):
            raise Unreadable("two variables are compared")
        return str(side[1])
    names = symbols(side) | around
    if len(names) != 1:
        raise Unreadable("an inequality in several variables")
    return next(iter(names))


def _half(left: Node, operator: str, right: Node, variable: str) -> Piece:
    """The half-line of solutions of a linear inequality."""
    if left == ("sym", variable) and variable not in symbols(right):
        bound = right
    else:
        difference: Node = ("-", left, right)
        start = substitute(difference, variable, ("num", Fraction(0)))
        slope: Node = ("-", substitute(difference, variable, ("num", Fraction(1))), start)
        if not equal(difference, ("+", ("*", slope, ("sym", variable)), start)) or close(constant(slope), Fraction(0)):
            raise Unreadable("an inequality that is not linear")
        bound = ("neg", ("/", start, slope))
        if number(constant(slope)) < 0:
            operator = FLIPPED[operator]
    closed = operator in "≤≥"
    return Piece(MINUS_INFINITY, False, bound, closed) if operator in "<≤" else Piece(bound, closed, INFINITY, False)
