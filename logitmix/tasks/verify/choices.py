"""Choices: answers to multiple-choice questions, which are letters."""

from __future__ import annotations

import re

CHOICE = re.compile(r"\(?([A-Ja-e])[).]?")
LABELLED = re.compile(r"\(?([A-J])(?:\)\s*[:.]?|[:.]\)?)\s*(.+)", re.DOTALL)


def no_choice(prediction: str) -> bool | None:
    """The verdict on a prediction that is not a choice, for a gold of one letter: False, or None if it holds a letter.

    Such a gold may also be a formula, so a prediction with letters is left to the formula parser.
    """
    return None if re.search(r"[A-Ja-j]", prediction) else False


def letters_of(text: str) -> str:
    """The letters that an answer chooses, in capitals; empty if it is not a choice."""
    if match := CHOICE.fullmatch(text):
        return match[1].upper() if (match[1] in "abcd" and text[0] == "(") or match[1].isupper() else ""
    letters = re.sub(r"\\(?:and|or)\s*|[\s,()]|\band\b", "", text)
    return letters if re.fullmatch(r"[A-H]{2,8}", letters) and len(set(letters)) == len(letters) else ""
