r"""Decides whether two answers mean the same.

Every verdict is True, False, or None for "undecided". Structures are compared part by part by the same rules, and
formulas by value. docs/verifier.md lists the decisions on which public graders disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from logitmix.tasks.verify.answers import NAME, Answer, is_words, plain, read
from logitmix.tasks.verify.choices import LABELLED, letters_of, no_choice
from logitmix.tasks.verify.relations import (
    FLIPPED,
    as_set,
    interval,
    is_point,
    name_of,
    oriented,
    proportional,
    values_of,
    variable,
)
from logitmix.tasks.verify.tokens import Unreadable
from logitmix.tasks.verify.values import DECIMAL, SCIENTIFIC, Undefined, equal, rounded, value

MAX_PARTS = 40


def same(prediction: str, gold: str) -> bool | None:
    """Whether two normalised answers mean the same; None if undecided."""
    if prediction == gold:
        return bool(gold)
    if not prediction or not gold:
        return False
    choice = _same_choice(prediction, gold)
    if choice is not None:
        return choice
    if is_words(prediction) and is_words(gold):
        return plain(prediction) == plain(gold)
    if DECIMAL.fullmatch(gold) and prediction.count(",") == 1 and prediction.replace(",", ".") == gold:
        return True  # a decimal comma
    return _same(read(prediction), read(gold))


def read_plain_number(text: str) -> Fraction | None:
    """The value of a decimal number or a fraction of integers, with or without thousands separators."""
    if match := re.fullmatch(r"(-?)(?:\\frac\{(-?[0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))", text):
        top, bottom = int(match[2] or match[4]), int(match[3] or match[5])
        return Fraction(-top if match[1] else top, bottom) if bottom else None
    if re.fullmatch(r"[-+]?(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)|[0-9]+)?(?:\.[0-9]*)?", text):
        digits = text.replace(",", "").replace(" ", "").rstrip(".")
        return Fraction(digits) if digits.strip("+-") else None
    return None


def _same_choice(prediction: str, gold: str) -> bool | None:
    """Compare choices: the gold is a letter, letters, or a letter and its text; None for any other gold."""
    letters = letters_of(gold)
    if letters:
        found = letters_of(prediction)
        if not found and len(letters) == 1 and (labelled := LABELLED.fullmatch(prediction)):
            found = labelled[1]
        if found:
            return sorted(found) == sorted(letters)
        return None if len(letters) > 1 or gold.islower() or "," in prediction else no_choice(prediction)
    labelled = LABELLED.fullmatch(gold)
    if labelled is None:
        return None
    if found := letters_of(prediction):
        return found == labelled[1]
    if (other := LABELLED.fullmatch(prediction)) and other[1] != labelled[1]:
        return False
    return same(other[2] if other else prediction, labelled[2])


def _same(prediction: Answer, gold: Answer) -> bool | None:
    if prediction == gold:
        return True
    kinds = {prediction.kind, gold.kind}
    if "relation" in kinds or ("list" in kinds and kinds & {"tuple", "union"} and _are_inequalities(prediction, gold)):
        return _same_relation(prediction, gold)
    if len(prediction.parts) > MAX_PARTS or len(gold.parts) > MAX_PARTS:
        return None
    if "union" in (prediction.kind, gold.kind):
        return _same_union(prediction, gold)
    if "matrix" in (prediction.kind, gold.kind):
        return _same_matrix(prediction, gold)
    if prediction.parts or gold.parts or "set" in (prediction.kind, gold.kind):
        return _same_collection(prediction, gold)
    if prediction.kind == "words" or gold.kind == "words":
        return prediction.kind == gold.kind and prediction.text == gold.text
    if prediction.unit and gold.unit and not _same_unit(prediction.unit, gold.unit):
        return False
    return _same_formula(prediction.text, gold.text)


def _same_unit(left: str, right: str) -> bool:
    """Whether the units are the same, to the same power; a power that one of them leaves out is ignored."""
    (left_name, left_power), (right_name, right_power) = (
        (unit.rstrip("0123456789"), unit.lstrip("abcdefghijklmnopqrstuvwxyz")) for unit in (left, right)
    )
    return (not left_name or not right_name or left_name == right_name) and (
        not left_power or not right_power or left_power == right_power
    )


def _same_formula(prediction: str, gold: str) -> bool | None:
    if prediction == gold:
        return True
    left, right = (re.sub(r"^\+", "", text) for text in (prediction, gold))
    numbers = read_plain_number(left), read_plain_number(right)
    if numbers[0] is not None and numbers[0] == numbers[1]:
        return True
    if numbers[0] is not None and numbers[1] is not None:
        return rounded(left, numbers[1], right) or rounded(right, numbers[0], left)
    for one, other in ((left, right), (right, left)):
        if re.search(r"(?<!\\%)\\%$", one) and not other.endswith("\\%") and _same_formula(one[:-2], other):
            return True  # "50%" and "50", where the question asks for a percentage; see docs/verifier.md
    if "\\infty" in left or "\\infty" in right:
        return _infinite(left) == _infinite(right) if _infinite(left) and _infinite(right) else False
    verdict = equal(left, right)
    if verdict is False:
        for one, other in ((left, right), (right, left)):
            decimal = SCIENTIFIC.fullmatch(one)
            if decimal and not SCIENTIFIC.fullmatch(other):
                try:
                    shifted = f"({other})/10^{{{decimal[2]}}}" if decimal[2] else other
                    if rounded(decimal[1], value(shifted), other):
                        return True
                except (Unreadable, Undefined):
                    pass
    return verdict


def _are_inequalities(*answers: Answer) -> bool:
    """Whether one of the answers is a list of inequalities, which together describe a set."""
    parts = [part for answer in answers if answer.kind == "list" for part in answer.parts]
    return all(part.kind == "relation" and part.text != "=" and part.text in FLIPPED for part in parts)


def _infinite(text: str) -> str:
    return text.lstrip("+") if text.lstrip("+") in ("\\infty", "-\\infty") else ""


def _same_collection(prediction: Answer, gold: Answer) -> bool | None:
    kinds = {prediction.kind, gold.kind}
    left, right = prediction.parts, gold.parts
    if len(kinds) == 2 and kinds & {"formula", "words"}:
        # A set of one element equals that element; no other answer with parts equals one without.
        collection, single = (prediction, gold) if prediction.parts else (gold, prediction)
        return _same(collection.parts[0], single) if collection.kind == "set" and len(collection.parts) == 1 else False
    if kinds == {"tuple", "set"}:
        return False
    if "tuple" in kinds:
        if prediction.kind == gold.kind:
            brackets = prediction.text.replace("][", "()"), gold.text.replace("][", "()")
            loose = len(left) > 2 and {*brackets} == {"()", "[]"}  # (1, 2, 3) and [1, 2, 3] are not intervals
            if brackets[0] != brackets[1] and not loose and not _french(prediction, gold):
                return False
        elif len(left) == 2 and (prediction.text + gold.text).strip("and") != "()":
            return False  # "1, 2" is the point (1, 2), not an interval
        if kinds == {"tuple", "list"}:
            left, right = values_of(left), values_of(right)
        return (
            _all(_same(one, other) for one, other in zip(left, right, strict=True))
            if len(left) == len(right)
            else False
        )
    if "set" in kinds:
        left, right = _distinct(left), _distinct(right)
    verdict = _same_unordered(left, right)
    if verdict is not True and len(left) == len(right):
        stripped = values_of(left), values_of(right)
        if (stripped[0] != left) != (stripped[1] != right):
            # "x=1, y=2" and "1, 2": names on one side only are removed, and then the order counts.
            if len({name_of(part) for part in (*left, *right)} - {""}) > 1:
                return _all(_same(one, other) for one, other in zip(*stripped, strict=True))
            return _same_unordered(*stripped)
    return verdict


def _french(prediction: Answer, gold: Answer) -> bool:
    return _half_open(prediction.text) == _half_open(gold.text) and len(prediction.parts) == 2


def _half_open(brackets: str) -> str:
    return ("(" if brackets[0] in "(]" else "[") + (")" if brackets[1] in ")[" else "]")


def _distinct(parts: tuple[Answer, ...]) -> tuple[Answer, ...]:
    found: list[Answer] = []
    for part in parts:
        if not any(_same(part, other) for other in found):
            found.append(part)
    return tuple(found)


def _same_unordered(left: Sequence[Answer], right: Sequence[Answer]) -> bool | None:
    if len(left) != len(right):
        return False
    rest, undecided = list(right), False
    for part in left:
        verdicts = [_same(part, other) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True


def _same_union(prediction: Answer, gold: Answer) -> bool | None:
    left, right = (
        tuple(interval(part) or part for part in (answer.parts if answer.kind in ("union", "list") else (answer,)))
        for answer in (prediction, gold)
    )
    return _same_unordered(left, right)


def _same_matrix(prediction: Answer, gold: Answer) -> bool | None:
    if prediction.kind != gold.kind:
        matrix, other = (prediction, gold) if prediction.kind == "matrix" else (gold, prediction)
        vector = _vector(matrix)
        if vector is None or other.kind != "tuple" or other.text not in ("()", "[]"):
            return False
        return (
            _all(_same(*pair) for pair in zip(vector, other.parts, strict=True))
            if len(vector) == len(other.parts)
            else False
        )
    if prediction.text != gold.text or len(prediction.parts) != len(gold.parts):
        return False
    return _all(
        _all(_same(*pair) for pair in zip(one.parts, other.parts, strict=True))
        if len(one.parts) == len(other.parts)
        else False
        for one, other in zip(prediction.parts, gold.parts, strict=True)
    )


def _vector(matrix: Answer) -> tuple[Answer, ...] | None:
    if len(matrix.parts) == 1:
        return matrix.parts[0].parts
    return tuple(row.parts[0] for row in matrix.parts) if all(len(row.parts) == 1 for row in matrix.parts) else None


def _same_relation(prediction: Answer, gold: Answer) -> bool | None:
    left, right = _simplified(prediction), _simplified(gold)
    sets = as_set(left), as_set(right)
    if sets[0] is not None and sets[1] is not None and sets != (prediction, gold):
        if variable(left) and variable(right) and variable(left) != variable(right):
            return False
        return _same(sets[0], sets[1])
    if left.kind != "relation" and right.kind != "relation":
        return False if (left, right) == (prediction, gold) else _same(left, right)
    if left.kind != right.kind:
        one, other = (left, right) if left.kind == "relation" else (right, left)
        if name_of(one) or is_point(one):
            return _same(one.parts[-1], other) if left.kind == "relation" else _same(other, one.parts[-1])
        if one.text == "=" and left.kind == "relation" and other.kind == "formula":
            # "2+3=5" for 5; but "11a+c=7" is not "7".
            return _all((_same(one.parts[0], one.parts[1]), _same(one.parts[1], other)))
        return False
    if left.text == right.text and _all(_same(*pair) for pair in zip(left.parts, right.parts, strict=True)):
        return True
    if left.text == right.text == "=":
        names = name_of(left), name_of(right)
        if names[0] and names[0] == names[1]:
            return _same(left.parts[-1], right.parts[-1])
        if "y" in names and "(" in "".join(names):
            return _same(left.parts[-1], right.parts[-1])  # y and f(x)
        if all(names):
            return proportional(left, right) is True  # y = 2x and x = y/2
    return proportional(left, right)


def _simplified(answer: Answer) -> Answer:
    """A relation in canonical form; a chain of equalities that hold is shortened to its ends."""
    if answer.kind != "relation":
        return answer
    operators, parts = answer.text.split(" "), answer.parts
    if len(operators) > 1 and set(operators) == {"="}:
        named = NAME.fullmatch(parts[0].text) or parts[0].kind == "tuple"
        if all(_same(part, parts[-1]) for part in (parts[1:] if named else parts)):
            answer = Answer("relation", "=", (parts[0], parts[-1]))
    return oriented(answer)
