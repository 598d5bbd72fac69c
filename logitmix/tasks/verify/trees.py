r"""Trees of answers, as tuples whose first element is their kind.

`("num", Fraction)`, `("sym", name)`, `("const", "pi")`, `("+", left, right)`, `("call", name, arguments...)` are
formulas. Kinds in `STRUCTURES` are answers with parts, which no operator takes: a kind, a text and its parts, as
`answers.py` lists them.
"""

from __future__ import annotations

from typing import Any

from logitmix.tasks.verify.tokens import Unreadable

Node = tuple[Any, ...]
STRUCTURES = frozenset(("list", "set", "tuple", "∪", "∩", "\\setminus", "rel", "words", "name", "unit", "numbers"))


def operation(kind: str, *parts: Any) -> Node:
    """A node of an operator or function, which takes no structure."""
    for part in parts:
        if isinstance(part, tuple) and part[0] in STRUCTURES:
            raise Unreadable(f"a {part[0]} stands where a number is expected")
    if kind in ("^", "call") and any(isinstance(part, tuple) and has(part, "deg") for part in parts):
        raise Unreadable("degrees stand inside a power or a function")
    return (kind, *parts)


def substitute(tree: Node, name: str, value: Node) -> Node:
    """The tree with a value in place of a variable."""
    if tree == ("sym", name):
        return value
    return tuple(substitute(part, name, value) if isinstance(part, tuple) else part for part in tree)


def symbols(tree: Node) -> frozenset[str]:
    """The variables of a tree, without those that a sum or a limit binds."""
    if tree[0] == "sym":
        return frozenset((tree[1],))
    found = frozenset().union(*(symbols(part) for part in _parts(tree)))
    return found - {tree[1]} if tree[0] in ("sum", "prod", "lim") else found


def has(tree: Node, kind: str, value: object = None) -> bool:
    """Whether a node of this kind occurs, with this value if one is given."""
    if tree[0] == kind and (value is None or tree[1] == value):
        return True
    return any(has(part, kind, value) for part in _parts(tree))


def _parts(tree: Node) -> list[Node]:
    found: list[Node] = []
    for part in tree[1:]:
        if isinstance(part, tuple) and part:
            if isinstance(part[0], tuple):
                found += [cell for row in part for cell in (row if isinstance(row[0], tuple) else (row,))]
            elif isinstance(part[0], str):
                found.append(part)
    return found
