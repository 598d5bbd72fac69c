r"""Relations: the name in x = 5, chains of equations, and equations up to a factor.

Accepted: `x=5` and `5`; `|AB|=1` and `1`; `f(m)=2m+1` and `f(n)=2n+1`; `y=2x+1` and `f(x)=2x+1`; `2x+4y=6` and
`x+2y=3`; `x=\frac{10}{4}=2.5` and `2.5`. Refused: `11a+c=7` and `7`; `y=5` and `x=5`; `x=5=6` and `6`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from logitmix.tasks.verify.evaluation import context
from logitmix.tasks.verify.reals import FLIPPED
from logitmix.tasks.verify.trees import STRUCTURES, Node, substitute, symbols
from logitmix.tasks.verify.values import ratio

Same = Callable[[Node, Node], bool]
_BOUND = re.compile(r"(\w+?'*)(?:\((\\?[a-zA-Z]+)\)|_\{?(\w)\}?)")


def name_of(tree: Node) -> str:
    """The name that a relation gives a value: x in x = 5."""
    return _name(tree[2][0]) if tree[0] == "rel" and tree[1] in (("=",), ("∈",)) else ""


def value_of(tree: Node) -> Node:
    """The value of a relation that names it: 5 for x = 5."""
    return tree[2][-1] if name_of(tree) else tree


def coordinates(tree: Node) -> Node:
    """The coordinates of a named point as a list, x = 1, y = 2 for (x, y) = (1, 2); any other tree unchanged."""
    if tree[0] == "rel" and is_point(tree) and tree[2][1][0] == "tuple" and len(tree[2][0][2]) == len(tree[2][1][2]):
        pairs = zip(tree[2][0][2], tree[2][1][2], strict=True)
        return ("list", ",", tuple(("rel", ("=",), pair) for pair in pairs))
    return tree


def is_point(tree: Node) -> bool:
    """Whether a relation gives a tuple of names a value, as (x, y) = (1, 2)."""
    return tree[1] in (("=",), ("∈",)) and tree[2][0][0] == "tuple" and all(_name(part) for part in tree[2][0][2])


def simplified(tree: Node, same: Same) -> Node:
    r"""A relation with its name on the left, smaller before larger, and chains of equations that hold in two parts.

    What follows `\approx` is dropped after an exact value. `x=y=z=1` becomes a list of three.
    """
    operators, parts = tree[1], tree[2]
    if "≈" in operators:
        place = operators.index("≈")
        if place == 0 and _name(parts[0]):
            operators = ("=", *operators[1:])
        else:
            operators, parts = operators[:place], parts[: place + 1]
    if not operators:
        return parts[0]
    if len(operators) > 1 and set(operators) == {"="}:
        names = [_name(part) for part in parts[:-1]]
        if all(names) and len(set(names)) == len(names):
            return ("list", "=", tuple(("rel", ("=",), (part, parts[-1])) for part in parts[:-1]))
        named = names[0] or parts[0][0] == "tuple"
        if all(same(part, parts[-1]) for part in (parts[1:-1] if named else parts[:-1])):
            operators, parts = ("=",), (parts[0], parts[-1])
    if len(operators) == 1 and operators[0] in FLIPPED and not _name(parts[0]) and _name(parts[1]):
        operators, parts = (FLIPPED[operators[0]],), parts[::-1]
    if len(operators) > 1 and all(operator in ">≥" for operator in operators):
        operators, parts = tuple(FLIPPED[operator] for operator in reversed(operators)), parts[::-1]
    return ("rel", operators, parts)


def same_relation(left: Node, right: Node, same: Same) -> bool:
    """Whether two simplified answers are equal, at least one of which is a relation."""
    if left[0] != right[0]:
        relation, other = (left, right) if left[0] == "rel" else (right, left)
        if name_of(relation) or is_point(relation):
            return same(relation[2][1], other)
        # "2+3=5" for 5; but "11a+c=7" is not "7".
        return (
            relation[1] == ("=",)
            and other[0] not in STRUCTURES - {"unit"}
            and same(*relation[2])
            and same(relation[2][1], other)
        )
    if left[1] == right[1] and all(same(*pair) for pair in zip(left[2], right[2], strict=True)):
        return True
    if left[1] == right[1] == ("=",):
        names = name_of(left), name_of(right)
        if names[0] and names[0] == names[1]:
            return same(left[2][1], right[2][1])
        if "y" in names and "(" in "".join(names):
            return same(left[2][1], right[2][1])  # y and f(x)
        if (bound := _bound_names(*names)) and bound[0] not in symbols(right[2][1]):
            return same(left[2][1], substitute(right[2][1], bound[1], ("sym", bound[0])))
    return _proportional(left, right)


def _name(side: Node) -> str:
    if side[0] == "name" or (side[0] == "sym" and not side[1][0].isdigit()) or side == ("const", "e"):
        return str(side[1])
    return ""


def _bound_names(left: str, right: str) -> tuple[str, str] | None:
    """The variables of f(m) and f(n), or of a_m and a_n, if the functions are the same."""
    one, other = _BOUND.fullmatch(left), _BOUND.fullmatch(right)
    if not one or not other or one[1] != other[1]:
        return None
    names = one[2] or one[3], other[2] or other[3]
    if (one[2] is None) != (other[2] is None) or any(name.isdigit() for name in names):
        return None
    return names


def _proportional(left: Node, right: Node) -> bool:
    """Whether two equations are equal up to a factor; two inequalities up to a positive factor, or a negative one that
    reverses them."""
    operators = left[1], right[1]
    if any(len(side) != 1 or side[0] not in FLIPPED for side in operators):
        return False
    sides = [tuple(part[2] if part[0] == "name" else part for part in tree[2]) for tree in (left, right)]
    if any(part[0] in STRUCTURES for side in sides for part in side):
        return False
    factor = ratio(("-", *sides[0]), ("-", *sides[1]))
    if factor is None:
        return False
    if operators[0][0] in "=≠":
        return operators[0] == operators[1]
    if isinstance(factor, context().mpc):
        return False
    return bool(operators[1][0] == (operators[0][0] if factor > 0 else FLIPPED[operators[0][0]]))
