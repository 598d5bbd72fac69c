r"""Relations: the name in x = 5, the set that 1 < x < 2 describes, and equations up to a factor."""

from __future__ import annotations

from logitmix.tasks.verify.answers import NAME, Answer
from logitmix.tasks.verify.formulas import parse, symbols
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.values import Undefined, context, ratio

FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}


def name_of(part: Answer) -> str:
    """The name that a relation assigns a value: x in x = 5."""
    if part.kind == "relation" and part.text in ("=", "\\in", "\\approx") and NAME.fullmatch(part.parts[0].text):
        return part.parts[0].text
    return ""


def values_of(parts: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """The parts, with the value in place of a relation that assigns one: 5 for x = 5."""
    return tuple(part.parts[-1] if name_of(part) else part for part in parts)


def oriented(answer: Answer) -> Answer:
    r"""A relation in canonical form: no `\approx` after an exact value, names on the left, smaller before larger."""
    if answer.kind != "relation":
        return answer
    operators, parts = answer.text.split(" "), list(answer.parts)
    if "\\approx" in operators:
        place = operators.index("\\approx")
        if place == 0 and NAME.fullmatch(parts[0].text):
            operators[0] = "="
        else:
            operators, parts = operators[:place], parts[: place + 1]
    if not operators:
        return parts[0]
    named = [bool(NAME.fullmatch(part.text)) for part in parts]
    if len(operators) == 1 and operators[0] in FLIPPED and named == [False, True]:
        operators, parts = [FLIPPED[operators[0]]], parts[::-1]
    if len(operators) > 1 and all(operator in (">", "\\ge") for operator in operators):
        operators, parts = [FLIPPED[operator] for operator in reversed(operators)], parts[::-1]
    return Answer("relation", " ".join(operators), tuple(parts))


def is_point(relation: Answer) -> bool:
    """Whether a relation assigns a tuple of names, as (x, y) = (1, 2)."""
    return (
        relation.text in ("=", "\\in")
        and relation.parts[0].kind == "tuple"
        and all(NAME.fullmatch(part.text) for part in relation.parts[0].parts)
    )


def variable(answer: Answer) -> str:
    """The one variable of a relation or a list of relations; empty if there is none, or several."""
    parts = answer.parts if answer.kind == "list" else (answer,)
    names = {
        next((part.text for part in relation.parts if NAME.fullmatch(part.text)), "")
        for relation in parts
        if relation.kind == "relation"
    }
    return names.pop() if len(names) == 1 else ""


def as_set(answer: Answer) -> Answer | None:
    """The set of numbers described by an inequality in one variable, or by several joined by "or"."""
    if answer.kind == "relation":
        if answer.text == "\\in" and name_of(answer):
            return answer.parts[1]
        return interval(answer)
    if answer.kind == "list" and answer.parts and all(part.kind == "relation" for part in answer.parts):
        pieces = [interval(oriented(part)) for part in answer.parts]
        if any(piece is None for piece in pieces):
            return None
        found = tuple(piece for piece in pieces if piece is not None)
        if answer.text != "and":
            return Answer("union", "", found)
        if len(found) == 2:
            low = next((part for part in found if part.parts[1].text == "\\infty"), None)
            high = next((part for part in found if part.parts[0].text == "-\\infty"), None)
            if low and high and low != high:
                return Answer("tuple", low.text[0] + high.text[1], (low.parts[0], high.parts[1]))
        return None
    return answer if answer.kind in ("tuple", "union", "set") else None


def interval(answer: Answer) -> Answer | None:
    """The interval, or union of two, that an inequality in one variable describes; None for any other answer."""
    if answer.kind != "relation":
        return None
    infinity, operators, parts = Answer("formula", "\\infty"), answer.text.split(" "), answer.parts
    minus = Answer("formula", "-\\infty")
    if len(operators) == 1 and NAME.fullmatch(parts[0].text) and _is_number(parts[1]):
        bound = parts[1]
        if operators[0] in ("<", "\\le"):
            return Answer("tuple", "(" + (")" if operators[0] == "<" else "]"), (minus, bound))
        if operators[0] in (">", "\\ge"):
            return Answer("tuple", ("(" if operators[0] == ">" else "[") + ")", (bound, infinity))
        if operators[0] == "\\ne":
            return Answer(
                "union", "", (Answer("tuple", "()", (minus, bound)), Answer("tuple", "()", (bound, infinity)))
            )
    between = len(operators) == 2 and set(operators) <= {"<", "\\le"} and NAME.fullmatch(parts[1].text)
    if between and _is_number(parts[0]) and _is_number(parts[2]):
        brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
        return Answer("tuple", brackets, (parts[0], parts[2]))
    return None


def _is_number(answer: Answer) -> bool:
    if answer.kind != "formula" or "\\infty" in answer.text:
        return answer.kind == "formula"
    try:
        return not symbols(parse(answer.text))
    except Unreadable:
        return False


def _variables(text: str) -> set[str]:
    return symbols(parse(text))


def proportional(left: Answer, right: Answer) -> bool | None:
    """Whether two equations are equal up to a factor; two inequalities up to a positive factor, or a negative one that
    reverses them."""
    operators = left.text, right.text
    if " " in operators[0] or " " in operators[1] or operators[0] not in FLIPPED or operators[1] not in FLIPPED:
        return None if operators[0] == operators[1] else False
    if not all(part.kind == "formula" for part in (*left.parts, *right.parts)):
        return False
    texts = [f"({side.parts[0].text})-({side.parts[1].text})" for side in (left, right)]
    try:
        factor = ratio(*texts)
    except (Unreadable, Undefined):
        return None
    if factor is None:
        return None if all(_variables(text) for text in texts) and operators == ("=", "=") else False
    if operators[0] in ("=", "\\ne"):
        return operators[0] == operators[1]
    if isinstance(factor, context().mpc):
        return False
    return operators[1] == (operators[0] if factor > 0 else FLIPPED[operators[0]])
