r"""Parses answers from the outside in: lists, sets, tuples, intervals, matrices and relations of formulas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|subset|subseteq|equiv|sim)(?![a-zA-Z])|[=<>]")
NAME = re.compile(
    r"(?:\\?[a-zA-Z]+|\\(?:overline|vec|bar)\{[a-zA-Z]+\})'*(?:_\{[^{}]*\}|_\w)?"
    r"(?:\^\{(?:-1|\\prime|\\circ)\})?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?"
)
MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array|cases|vector)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
REALS = ("\\mathbb{R}", "R", "\\Re", "all real numbers", "all reals", "reals")


@dataclass(frozen=True)
class Answer:
    """A node of a parsed answer: its kind, and its parts.

    formula  no parts; `text` is the formula, `unit` its unit (None: no unit, "": an unknown one)
    words    no parts; `text` is the text
    list     in any order; set: the same, in braces
    tuple    in order; `text` holds its two brackets: an interval is a pair whose brackets matter
    matrix   rows, which are tuples; union: of sets, in any order
    relation `text` holds the operators between the parts, separated by blanks
    """

    kind: str
    text: str = ""
    parts: tuple[Answer, ...] = ()
    unit: str | None = None


def is_words(text: str) -> bool:
    """Words, not a formula; as a formula they would be products of letters, equal to their anagrams."""
    if text.casefold() == "no":
        return True
    return re.fullmatch(r"(?=[A-Za-z])[A-Za-z' .,-]*[A-Za-z]{3,}[A-Za-z' .,-]*", text) is not None and text not in (
        "sin",
        "cos",
    )


def plain(text: str) -> str:
    """Words without an article, case, blanks and punctuation."""
    return re.sub(r"^(?:the|an?)\b|[^a-z]", "", text.casefold())


@lru_cache(maxsize=4096)
def read(text: str, depth: int = 0) -> Answer:
    """Parse a normalised answer; parts nested more than 6 deep are kept as formulas."""
    if depth > 6:
        return Answer("formula", text)
    text = text.strip()
    if text in REALS:
        return Answer("tuple", "()", (Answer("formula", "-\\infty"), Answer("formula", "\\infty")))
    if text in ("\\emptyset", "\\{\\}") or text.casefold() in ("empty set", "the empty set", "emptyset"):
        return Answer("set")
    if text.startswith("\\{\\begin{array}") and text.endswith("\\end{array}"):  # a system without its right brace
        text = text[2:].replace("{array}", "{cases}")
    if match := MATRIX.fullmatch(text):
        return _read_matrix(match[1], match[2], depth)
    if "\\or" in text or "\\and" in text or "," in text or ";" in text:
        parts = _split(text, r"\s*[,;]?\s*\\(?:or|and)(?![a-zA-Z])\s*|\s*[;,]\s*")
        if len(parts) > 1:
            return Answer("list", "and" if "\\and" in text else "", _read_all(_expanded(parts), depth))
    if "\\cup" in text:
        parts = _split(text, r"\\cup(?![a-zA-Z])")
        if len(parts) > 1:
            return Answer("union", "", _read_all(parts, depth))
    if RELATION.search(text):
        pieces = _split(text, RELATION.pattern, keep=True)
        if len(pieces) > 2:
            operators = " ".join(pieces[1::2])
            return Answer("relation", operators, _read_all(pieces[0::2], depth))
    if (inner := _inside(text)) is not None:
        return _read_bracketed(text, inner, depth)
    if "\\pm" in text or "\\mp" in text:
        return Answer("list", "", _read_all(_expanded([text]), depth))
    if ":" in text:
        parts = _split(text, ":")
        if len(parts) > 1:
            return Answer("tuple", "::", _read_all(parts, depth))
    match = re.fullmatch(r"(.+?)\\unit\{(\w*)\}", text, re.DOTALL)
    body, unit = (match[1], match[2]) if match else (text, None)
    if is_words(body):
        return Answer("words", plain(body))
    return Answer("formula", body, unit=unit)


def _read_all(parts: Iterable[str], depth: int) -> tuple[Answer, ...]:
    return tuple(read(part, depth + 1) for part in parts)


def _read_matrix(name: str, body: str, depth: int) -> Answer:
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row.strip()]
    if name == "cases":
        return Answer("list", "cases", _read_all((row.replace("&", " ") for row in rows), depth))
    cells = tuple(Answer("tuple", "()", _read_all(row.split("&"), depth)) for row in rows)
    return Answer("matrix", "|" if name in ("vmatrix", "Vmatrix") else "", cells)


def _read_bracketed(text: str, inner: str, depth: int) -> Answer:
    brackets = text[0] + text[-1]
    if text.startswith("\\{"):
        condition = re.split(r"\\mid(?![a-zA-Z])|:|\|", inner, maxsplit=1)
        if len(condition) == 2 and RELATION.search(condition[1]):
            return read(condition[1], depth + 1)
        brackets = "{}"
    matrix = MATRIX.fullmatch(inner.strip())
    if matrix:
        return _read_matrix(matrix[1], matrix[2], depth)
    parts = _split(inner, r"[;,]")
    if brackets == "{}":
        return Answer("set", "", _read_all(_expanded(parts), depth))
    if len(parts) == 1:
        return read(inner, depth + 1) if brackets in ("()", "[]") else Answer("formula", text)
    return Answer("tuple", brackets, _read_all(parts, depth))


def _inside(text: str) -> str | None:
    """The text between the brackets that enclose all of it."""
    if text.startswith("\\{") and text.endswith("\\}"):
        start, end = 2, len(text) - 2
    elif len(text) > 2 and text[0] in "([" and text[-1] in ")]":
        start, end = 1, len(text) - 1
    elif re.fullmatch(r"\][^\[\]()]*[,;][^\[\]()]*\[|\][^\[\]()]*[,;][^\[\]()]*\]|\[[^\[\]()]*[,;][^\[\]()]*\[", text):
        return text[1:-1]
    else:
        return None
    depth = 0
    for character in text[start:end]:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
    return text[start:end] if depth == 0 else None


def _split(text: str, separator: str, keep: bool = False) -> list[str]:
    """Split outside brackets. `keep` keeps the separators as every second piece."""
    pieces, start, depth = [], 0, 0
    places = re.compile(rf"(?P<separator>{separator})|\\begin\{{|\\end\{{|\\[a-zA-Z]+|[(\[{{)\]}}]|.", re.DOTALL)
    for match in places.finditer(text):
        token = match[0]
        if match["separator"] is not None and depth == 0:
            pieces.append(text[start : match.start()])
            if keep:
                pieces.append(token.strip())
            start = match.end()
        elif token in ("(", "[", "{", "\\begin{"):
            # "\\begin{" opens a brace that its "}" closes, and the environment that "\\end{...}" closes
            depth += 2 if token == "\\begin{" else 1
        elif token in (")", "]", "}"):
            depth -= 1  # "\\end{...}" closes the environment: its own "{" is not counted
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces] if keep else [piece.strip() for piece in pieces if piece.strip()]


def _expanded(parts: Sequence[str]) -> list[str]:
    r"""Both values of each `\pm`; the sign of a `\mp` in the same answer changes with it."""
    found: list[str] = []
    for part in parts:
        signs = len(re.findall(r"\\pm(?![a-zA-Z])", part)) + len(re.findall(r"\\mp(?![a-zA-Z])", part))
        if signs == 0 or signs > 3:
            found.append(part)
        elif "\\mp" in part:
            found += [re.sub(r"\\pm", plus, re.sub(r"\\mp", minus, part)) for plus, minus in (("+", "-"), ("-", "+"))]
        else:
            some = [part]
            for _ in range(signs):
                some = [text.replace("\\pm", sign, 1) for text in some for sign in "+-"]
            found += some
    return found
