r"""Lists, sets, tuples and matrices, compared part by part.

Accepted: `-2, 1` and `1,-2`; `\{1,1,2\}` and `\{2,1\}`; `1,2` and `(1,2)`; `x=2, y=3` and `(2,3)`; `x=1, x=2` and
`1,2`; `(\pm1,0)` and `(1,0),(-1,0)`. Refused: `2,1` and `(1,2)`; `1,1,2` and `1,2,2`; `\{1,2\}` and `(1,2)`;
`p\lor q` and `p\land q`.
"""

from __future__ import annotations

from collections.abc import Sequence

from logitmix.tasks.verify.relations import Same, name_of, value_of
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.trees import Node, has

MAX_PARTS = 40
MAX_SIGNS = 3


def same_collection(left: Node, right: Node, same: Same, ordered: bool = True, inside: bool = False) -> bool:
    """Whether two answers are equal, at least one of which is a list, set or tuple.

    ordered: tuples have an order
    inside:  both are parts of an answer, where a set of one element is not that element
    """
    kinds = {left[0], right[0]}
    if not kinds <= {"list", "set", "tuple"}:
        if inside and "set" in kinds:
            return False
        return _same_single(*((left, right) if left[0] in ("list", "set", "tuple") else (right, left)), same)
    if max(len(left[2]), len(right[2])) > MAX_PARTS:
        raise Unreadable(f"more than {MAX_PARTS} parts are compared as text only")
    if kinds == {"tuple", "set"}:
        elements, point = (left[2], right) if left[0] == "set" else (right[2], left)
        if len(elements) == 1 and elements[0][0] == "tuple":
            return not inside and same(elements[0], point)
        return not ordered and same_unordered(left[2], right[2], same)
    if "tuple" in kinds:
        return _same_tuple(left, right, same, ordered)
    joiners = {left[1].replace("\\l", "\\"), right[1].replace("\\l", "\\")}
    if joiners == {"\\or", "\\and"} and ("\\lor" in (left[1], right[1]) or all(part[0] == "sym" for part in left[2])):
        return False
    parts = left[2], right[2]
    if "set" in kinds:
        parts = _distinct(parts[0], same), _distinct(parts[1], same)
    if same_unordered(parts[0], parts[1], same):
        return True
    values = [tuple(value_of(part) for part in side) for side in parts]
    if len(parts[0]) == len(parts[1]) and (values[0] != parts[0]) != (values[1] != parts[1]):
        # "x=1, y=2" and "1, 2": names on one side only are removed, and then the order counts.
        if ordered and len({name_of(part) for side in parts for part in side} - {""}) > 1:
            return _same_in_order(values[0], values[1], same)
        return same_unordered(values[0], values[1], same)
    names = [[name_of(part) for part in side] for side in parts]
    if all(all(side) for side in names) and len({name.partition("_")[0] for side in names for name in side}) == 1:
        # x_1 = 1, x_2 = 2 are the values of x
        return ({*names[0]} == {names[0][0]} or {*names[1]} == {names[1][0]}) and same_unordered(
            values[0], values[1], same
        )
    return False


def same_matrix(left: Node, right: Node, same: Same) -> bool:
    """Whether a matrix of one row or column equals a tuple."""
    matrix, other = (left, right) if left[0] == "matrix" else (right, left)
    rows = matrix[1]
    vector = rows[0] if len(rows) == 1 else tuple(row[0] for row in rows) if len(rows[0]) == 1 else None
    return vector is not None and other[1] in ("()", "[]") and _same_in_order(vector, other[2], same)


def same_unordered(left: Sequence[Node], right: Sequence[Node], same: Same) -> bool:
    """Whether the parts of both sides can be paired so that those of each pair are equal."""
    if len(left) != len(right):
        return False
    rest = list(right)
    for part in left:
        place = next((place for place, other in enumerate(rest) if same(part, other)), None)
        if place is None:
            return False
        rest.pop(place)
    return True


def expanded(tree: Node) -> tuple[Node, ...]:
    r"""Both values of each `\pm`; the sign of a `\mp` in the same answer changes with it."""
    if tree[0] in ("list", "set"):
        return ((tree[0], tree[1], tuple(value for part in tree[2] for value in expanded(part))),)
    if not has(tree, "pm"):
        return (tree,)
    if tree[0] == "rel" and tree[1] not in (("=",), ("≈",)) and "=" not in tree[1][:1]:
        raise Unreadable("a sign ± in an inequality")
    if has(tree, "pm", "∓"):
        return tuple(_signed(tree, [sign] * 99) for sign in (True, False))
    signs = _count(tree)
    if signs > MAX_SIGNS:
        raise Unreadable(f"more than {MAX_SIGNS} signs ±")
    return tuple(_signed(tree, [bool(case >> place & 1) for place in range(signs)]) for case in range(2**signs))


def _same_single(collection: Node, single: Node, same: Same) -> bool:
    """A set of one element equals that element, and so does a chain x = y = 1 its value."""
    kind, joiner, parts = collection
    if kind == "set":
        return len(parts) == 1 and parts[0][0] != "set" and same(parts[0], single)
    return kind == "list" and joiner == "=" and same(parts[0][2][1], single)


def _same_tuple(left: Node, right: Node, same: Same, ordered: bool) -> bool:
    parts = left[2], right[2]
    if left[0] == right[0]:
        brackets = _opened(left[1]), _opened(right[1])
        loose = len(parts[0]) > 2 and {*brackets} == {"()", "[]"}  # (1, 2, 3) and [1, 2, 3] are not intervals
        if brackets[0] != brackets[1] and not loose:
            return False
    else:
        place = 0 if left[0] == "tuple" else 1
        if len(parts[0]) == 2 and (left, right)[place][1] != "()":
            return False  # "1, 2" is the point (1, 2), not an interval
        parts = tuple(value_of(part) for part in parts[0]), tuple(value_of(part) for part in parts[1])
    return (
        _same_in_order(parts[0], parts[1], same)
        if ordered or "::" in (left[1], right[1])
        else same_unordered(parts[0], parts[1], same)
    )


def _opened(brackets: str) -> str:
    """The brackets of an interval with the French ones reversed: ]0, 1[ is (0, 1)."""
    return (
        brackets if brackets == "::" else ("[" if brackets[0] == "[" else "(") + ("]" if brackets[1] == "]" else ")")
    )


def _same_in_order(left: Sequence[Node], right: Sequence[Node], same: Same) -> bool:
    return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))


def _distinct(parts: Sequence[Node], same: Same) -> tuple[Node, ...]:
    found: list[Node] = []
    for part in parts:
        if not any(same(part, other) for other in found):
            found.append(part)
    return tuple(found)


def _signed(tree: Node, signs: list[bool]) -> Node:
    """The tree with each plus-minus, from left to right, replaced by a plus (True) or a minus."""
    if tree[0] == "pm":
        operands = [_signed(part, signs) for part in tree[2:-1]]
        plus = signs.pop(0) == (tree[1] == "±")
        operands.append(_signed(tree[-1], signs))
        if len(operands) == 2:
            return ("+" if plus else "-", *operands)
        return operands[0] if plus else ("neg", operands[0])
    return tuple(_signed(part, signs) if isinstance(part, tuple) else part for part in tree)


def _count(tree: Node) -> int:
    inner = sum(_count(part) for part in tree if isinstance(part, tuple))
    return inner + (tree[:1] == ("pm",))
