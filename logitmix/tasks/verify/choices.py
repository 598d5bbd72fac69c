"""Choices: answers to multiple-choice questions, which are letters."""

from __future__ import annotations

import re

CHOICE = re.compile(r"\(?([A-Ja-e])[).]?")
LABELLED = re.compile(r"\(?([A-J])(?:\)\s*[:.]?|[:.]\)?)\s*(.+)", re.DOTALL)


def no_choice(prediction: str) -> bool | None:
    """A gold of one capital letter may also be a formula, so formulas of letters are left to the formula parser."""
    return None if re.search(r"[A-Ja-j]", prediction) else False


def letters_of(text: str) -> str:
    if match := CHOICE.fullmatch(text):
        return match[1].upper() if (match[1] in "abcd" and text[0] == "(") or match[1].isupper() else ""
    letters = re.sub(r"\\(?:and|or)\s*|[\s,()]|\band\b", "", text)
    return letters if re.fullmatch(r"[A-H]{2,8}", letters) and len(set(letters)) == len(letters) else ""
