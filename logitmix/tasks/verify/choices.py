r"""Choices: answers to multiple-choice questions, which are letters.

Accepted: `(B)`, `B.` and `B: 12` for `B`; `D, B` for `BD`; `12` for `B: 12`.
Refused: `b` and `12` for `B`; `A or B` for `B`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

CHOICE = re.compile(r"\(?([A-Ja-e])[).]?")
# A letter and its text, in which something is written, and no other letter
LABELLED = re.compile(
    r"\(?([A-J])(?:\)\s*[:.]?|[:.]\)?)\s*(?!\W*[A-J]\W*(?![\w\\]))(?=(?:\\[a-zA-Z]+|.)*?(?<![\\a-zA-Z])\w)(.+)",
    re.DOTALL,
)


def same_choice(prediction: str, gold: str, same: Callable[[str, str], bool]) -> bool | None:
    """Compare choices: the gold is a letter, letters, or a letter and its text; None for any other gold."""
    letters = letters_of(gold)
    if letters:
        found = letters_of(prediction)
        if not found and len(letters) == 1 and (labelled := LABELLED.fullmatch(prediction)):
            found = labelled[1]
        if found:
            return sorted(found) == sorted(letters)
        # A letter may also be a formula, so a prediction with letters is left to the formulas.
        undecided = len(letters) > 1 or gold.islower() or "," in prediction or re.search(r"[A-Ja-j]", prediction)
        return None if undecided else False
    labelled = LABELLED.fullmatch(gold)
    if labelled is None:
        other = LABELLED.fullmatch(prediction)
        return same(other[2], gold) if other else None
    if found := letters_of(prediction):
        return found == labelled[1]
    other = LABELLED.fullmatch(prediction)
    if other and other[1] != labelled[1]:
        return False
    return same(other[2] if other else prediction, labelled[2])


def is_choice(text: str) -> bool:
    """Whether an answer is one letter or several, or a letter and its text."""
    return bool(letters_of(text) or LABELLED.fullmatch(text))


def letters_of(text: str) -> str:
    """The letters that an answer chooses, in capitals; empty if it is not a choice."""
    text = text.strip("{}" if text[:1] == "{" and text[-1:] == "}" else " ")
    if match := CHOICE.fullmatch(text):
        return match[1].upper() if (match[1] in "abcd" and text[0] == "(") or match[1].isupper() else ""
    letters = re.sub(r"\\(?:and|or)\s*|[\s,()]", "", text)
    return letters if re.fullmatch(r"[A-H]{2,8}|[①-⑩]{1,8}", letters) and len(set(letters)) == len(letters) else ""
