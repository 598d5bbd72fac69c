r"""Explains a verdict: the tokens of both answers, how they were read, and the rules that decided.

>>> print(explain("0<x<2", "(0,2)"))
prediction: 0<x<2
    tokens: 0 < x < 2
    read as: relation 0 < x < 2
gold: (0,2)
    tokens: ( 0 , 2 )
    read as: tuple ( 0 ; 2 )
step: relation 0 < x < 2 ~ tuple ( 0 ; 2 ): equal (sets of real numbers are equal as sets)
verdict: equal
"""

from __future__ import annotations

from logitmix.tasks.verify.answers import read
from logitmix.tasks.verify.compare import Comparison
from logitmix.tasks.verify.grading import compare, opened
from logitmix.tasks.verify.tokens import Unreadable, spell, tokenize
from logitmix.tasks.verify.trees import Node

_WITH_PARTS = frozenset(("list", "set", "tuple", "rel", "unit", "∪", "∩", "\\setminus"))
_KINDS = {"rel": "relation", "unit": "with unit", "name": "quantity", "numbers": "set of numbers"}


def explain(prediction: str, gold: str, lenient: bool = False) -> str:
    """What the verifier reads in two answers, each rule that it applied, and its verdict, one per line."""
    lines = []
    for title, text in (("prediction", prediction), ("gold", gold)):
        tokens = tokenize(opened(text))
        try:
            reading = show(read(tuple(tokens)))
        except Unreadable as error:
            reading = f"nothing, only equal to its own text: {error}"
        lines += [f"{title}: {text}", f"    tokens: {spell(tokens)}", f"    read as: {reading}"]
    comparison = Comparison(lenient)
    verdict, reason = compare(prediction, gold, comparison)
    for step in comparison.steps:
        pair = f"{show(step.left)} ~ {show(step.right)}: " if step.left else ""
        lines.append(f"{'  ' * step.depth}step: {pair}{_equal(step.verdict)} ({step.rule})")
    return "\n".join([*lines, f"verdict: {_equal(verdict)}" + (f" ({reason})" if reason else "")])


def show(tree: Node) -> str:
    """A tree in one line, its structures by name."""
    kind = tree[0]
    parts = [show(part) for part in tree[2]] if kind in _WITH_PARTS else []
    if kind == "num":
        return str(tree[1])
    if kind in ("sym", "const", "sample"):
        return str(tree[1])
    if kind == "inf":
        return "∞"
    if kind in ("words", "numbers", "name"):
        return f"{_KINDS.get(kind, kind)} {tree[1]}"
    if kind == "rel":
        return "relation " + " ".join(
            mark for pair in zip(parts, (*tree[1], ""), strict=True) for mark in pair if mark
        )
    if kind == "tuple" and tree[1] != "::":
        return f"tuple {tree[1][0]} {' ; '.join(parts)} {tree[1][1]}"
    if kind in ("list", "set", "unit", "tuple"):
        return f"{_KINDS.get(kind, kind)} {tree[1] if kind == 'unit' else ''}{{ {' ; '.join(parts)} }}"
    if kind == "matrix":
        return "matrix [" + " | ".join(" ".join(map(show, row)) for row in tree[1]) + "]"
    if kind in _WITH_PARTS:
        return f" {kind} ".join(parts)
    inner = [show(part) if isinstance(part, tuple) else str(part) for part in tree[1:] if part != ""]
    if kind in "+-*/^" and len(inner) == 2:
        return f"({inner[0]} {kind} {inner[1]})"
    return f"{tree[1]}({', '.join(inner[1:])})" if kind in ("call", "apply") else f"{kind}({', '.join(inner)})"


def _equal(verdict: bool) -> str:
    return "equal" if verdict else "different"
