r"""The tokenizer: one spelling for each sign, name, number and word of an answer.

Only these disappear: blanks, sizes (`\left`), styles, colours, dollar signs around formulas, `\text` around words. A
token remembers what stood before it, so that `4 2` is never 42. Anything unknown stays, and the parser refuses it.

>>> spell(tokenize(r"$\left(3,\ \dfrac{\pi}2\right)$."))
'( 3 , \\frac { \\pi } 2 )'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from logitmix.tasks.verify.spellings import (
    ABOUT,
    BOLD,
    CONCLUDING,
    FUNCTIONS,
    LEADING,
    NOUNS,
    SAME,
    STYLES,
    SUPERSCRIPTS,
    TEXTS,
    UNICODE,
)

JOINED, BLANK, MARKUP = 0, 1, 2


class Unreadable(Exception):
    """The grammar does not read this text."""


class Token(NamedTuple):
    """A token and what precedes it: nothing, a blank, or markup that is not kept. A word of a text begins with `"`."""

    text: str
    gap: int = JOINED


_TOKEN = re.compile(
    rf"""(?P<blank>(?:\s|~|\\(?:[,;:>\s]|(?:{STYLES.replace(" ", "|")})(?![a-zA-Z])))+)
    |(?P<number>[0-9]{{1,3}}(?:(?:\s*,\s*\\!\s*|\{{\s*,\s*\}}|\\,)[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?
        |[0-9]*\.\([0-9]+\)|[0-9]*\.[0-9]*(?:\\overline\s*\{{[0-9]+\}}|\\dot\s*\{{?[0-9]\}}?(?:[0-9]*\\dot\s*\{{?[0-9]\}}?)?)
        |[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+(?![0-9a-zA-Z.]))?|\.[0-9]+)
    |(?P<dropped>\\!|\\[()\[\]]|\$+|`|\\(?:text)?color\s*\{{[a-zA-Z]\w*\}}|\\[hv]?phantom\s*(?:\{{[^{{}}]*\}}|[^\s{{}}])
        |\\begin\s*\{{(?:align|aligned|equation|gather|gathered|split)\*?\}}
        |\\end\s*\{{(?:align|aligned|equation|gather|gathered|split)\*?\}})
    |(?P<text>\\(?:{TEXTS.replace(" ", "|")})\*?\s*\{{(?P<words>[^{{}}]*)\}})
    |\\(?P<size>left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*(?P<fence>[()\[\]|.<>/]|\\[{{}}|]
        |\\[lr](?:vert|Vert|brace|brack|paren|floor|ceil|angle)(?![a-zA-Z])|(?=[\s$.]*$))
    |(?P<half>[aApP]\.\s?[mM]\.)
    |(?P<degree>\^\s*(?:\{{\s*(?:\\circ|o|°)\s*\}}|\\circ(?![a-zA-Z])|°))
    |(?P<environment>\\(?:begin|end)\s*\{{[a-zA-Z]+\*?\}})
    |(?P<currency>\\\$|[$€£¥₹](?=\s*[0-9.])|(?<=[0-9])\s*[€£¥₹])
    |(?P<run>[a-zA-Z]+'*)
    |\\not\s*=|\\[a-zA-Z]+|\\.|<=|>=|!=|==|\*\*|~=|\.\.\.?|.""",
    re.DOTALL | re.VERBOSE,
)
_MATHS = {"\\(": "\\)", "\\)": "\\(", "\\[": "\\]", "\\]": "\\["}  # delimiters of formulas, in pairs
_GROUPED = re.compile(r"(?<![\w.,}])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_SPACED = re.compile(r"\s*[-+]?[0-9]{1,3}(?:(?:\s|~|\\[ ,;:])[0-9]{3})+(?:\.[0-9]+)?\s*")
_CONDITIONS = frozenset("∈<>≤≥≠")
# Single letters of a text that are units after a number; others are variables.
_UNIT_LETTERS = frozenset("mgslhLNJWVAKCFTPHZ")


def tokenize(text: str) -> list[Token]:
    r"""The tokens of an answer, without an opening such as "The answer is" and without closing punctuation."""
    return _trimmed(_lex(_prepared(text), in_text=False))


def spell(tokens: Sequence[Token]) -> str:
    """The tokens as a text, with single blanks."""
    return " ".join(token.text for token in tokens)


def text_of(tokens: Sequence[Token]) -> str:
    """The tokens as a text without blanks, and without the marks of words."""
    return "".join(text[1:] if text[0] == '"' and text[1:] else text for text, _ in tokens)


def _prepared(text: str) -> str:
    if "<su" in text:
        text = re.sub(r"<su([pb])>([^<>]*)</su\1>", lambda tag: f"{'^_'[tag[1] == 'b']}{{{tag[2]}}}", text)
    text = text.strip()
    if not text.isascii():
        text = re.sub("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: f"^{{{power[0].translate(SUPERSCRIPTS)}}}", text)
        text = text.translate(UNICODE)
    if "^" in text:
        text = re.sub(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", "*", text)
        text = re.sub(r"(?<=[0-9])\^\s*\{\s*(?:\\(?:text|mathrm|rm)\s*\{?\s*)?(?:st|nd|rd|th)\s*\}{1,2}", "", text)
    for mark in ("**", '"', "``"):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark) and text.count(mark) == 2:
            text = text[len(mark) : -len(mark)].strip()
    text = text.replace("{,}", ",\\!")
    if "," in text and not re.search(r"(?<!\\)[(\[]|\\\{", text):
        text = _GROUPED.sub(lambda digits: digits[0].replace(",", ""), text)
    if _SPACED.fullmatch(text.strip("$")):
        text = re.sub(r"[\s~]|\\[ ,;:]", "", text)
    return text


def _lex(text: str, in_text: bool) -> list[Token]:
    tokens: list[Token] = []
    gap, odd = JOINED, (text.count("$") - text.count("\\$")) % 2 == 1
    stray = {mark for mark in _MATHS if text.count(mark) != text.count(_MATHS[mark])} | ({"$", "`"} if odd else {"`"})
    fences: list[str] = []  # what follows each \\left that is still open
    for match in _TOKEN.finditer(text):
        kind, found = match.lastgroup, match[0]
        if kind == "blank":
            gap = max(gap, BLANK)
            continue
        if kind == "dropped" and found in stray and not _at_edge(text, match):
            kind = "stray"
        if kind == "dropped" and not (odd and found == "$" and _opens_amount(tokens, text[match.end() :])):
            gap = gap if found == "\\!" else MARKUP
            continue
        if kind == "text":
            gap = _lex_text(match["words"], tokens, gap, text[match.end() : match.end() + 1])
            continue
        if match["size"]:
            found = match["fence"]
            opened = fences.pop() if match["size"] == "right" and fences else match["size"]
            if match["size"] == "left":
                fences.append(found)
            elif opened == "right":
                fences.append("")
            if found in (".", ""):
                continue
            bar = "\\lvert" if opened == "left" else "\\rvert" if opened == "|" else "|"
            found = bar if found == "|" else SAME.get(found, found)
        else:
            found = _spelling(kind, found, in_text)
        if found in BOLD or not found:
            gap = MARKUP
            continue
        tokens.append(Token(found, gap))
        gap = JOINED
    if fences:  # a bracket is open, or was never opened
        tokens.insert(0, Token("\\left"))
    return tokens


def _spelling(kind: str | None, found: str, in_text: bool) -> str:
    """The one spelling of a sign, name, number or word, by the group of `_TOKEN` that matched it."""
    if kind == "number":
        return _number(found)
    if kind == "degree":
        return "°"
    if kind == "currency":
        return found.strip().lstrip("\\")
    if kind == "half":
        return f'"{found[0].lower()}m'
    if kind == "environment":
        return re.sub(r"\s", "", found)
    if kind == "run" and in_text and len(found) > 1:
        return SAME.get(found, found if found in FUNCTIONS else f'"{found}')
    return SAME.get(found, found)


def _at_edge(text: str, match: re.Match[str]) -> bool:
    """Whether one side of a match has only blanks, points and delimiters of formulas."""
    return any(
        re.fullmatch(r"(?:[\s$.,;]|\\[()\[\]])*", side) for side in (text[: match.start()], text[match.end() :])
    )


def _opens_amount(tokens: list[Token], rest: str) -> bool:
    """Whether an unpaired dollar sign is a currency: before a number, at the start."""
    return all(token.text in "+-" for token in tokens) and re.match(r"\s*[0-9.]", rest) is not None


def _lex_text(words: str, tokens: list[Token], gap: int, after: str) -> int:
    """Append the tokens of a text; returns what precedes the next token."""
    inner = _lex(words, in_text=True)
    if words.count("(") != words.count(")") and not re.fullmatch(r"\s*[A-J]?[()]\s*", words):
        inner = [Token("\\text"), *inner]  # a bracket that leaves its text: not read
    before = tokens[-1].text[-1] if tokens else ""
    if len(inner) == 1 and inner[0].text in _UNIT_LETTERS and after != "_" and re.match(r"[0-9)}°]", before):
        inner = [Token(f'"{inner[0].text}')]
    for place, token in enumerate(inner):
        tokens.append(Token(token.text, max(gap, BLANK) if place == 0 and gap != MARKUP else max(gap, token.gap)))
        gap = JOINED
    return (BLANK if words[-1:].isspace() else JOINED) if inner else MARKUP


def _number(found: str) -> str:
    if "\\o" in found or "\\d" in found:
        head, _, period = re.sub(r"\\(?:overline|dot)", "\0", found, count=1).partition("\0")
        return f"{head}({re.sub(r'[^0-9]', '', period)})"
    return re.sub(r"\s*,\s*\\!\s*|\{\s*,\s*\}|\\,", "", found)


def _trimmed(tokens: list[Token]) -> list[Token]:
    while tokens and (tokens[-1].text in (".", ",", ";", ":") or tokens[-1].text == "\\\\"):
        tokens = tokens[:-1]
    start = 0
    while start < len(tokens) and tokens[start].text.strip('"').lower() in LEADING | ABOUT | CONCLUDING:
        start += 1
        if tokens[start - 1].text.strip('"').lower() in CONCLUDING:
            start += start < len(tokens) and tokens[start].text == ","
            tokens, start = tokens[start:], 0
    if start < len(tokens) and tokens[start].text.strip('"').lower() in NOUNS:
        after = [token.text.strip('"').lower() for token in tokens[start + 1 : start + 4]]
        marks = next((count for count, mark in enumerate(after) if mark not in ("is", "are", "=", ":")), len(after))
        if marks or re.fullmatch(r"\(?[A-J]\)?", "".join(token.text for token in tokens[start + 1 :])):
            tokens = tokens[start + 1 + marks :]
    elif start and tokens[start - 1].text.strip('"').lower() in ABOUT:
        tokens = tokens[start:]
    if tokens and tokens[0].text in (":", "=", "≈"):
        tokens = tokens[1:]
    return _with_condition(tokens)


def _with_condition(tokens: list[Token]) -> list[Token]:
    r"""A condition in brackets at the end, as in `k\pi (k\in\mathbb{Z})` or `x^2 (x>0)`, follows a comma."""
    if len(tokens) < 5 or tokens[-1].text != ")":
        return tokens
    texts = [token.text for token in tokens[:-1]]
    opening = len(texts) - 1 - texts[::-1].index("(") if "(" in texts else 0
    inside = texts[opening:]
    if opening == 0 or ")" in inside or texts[opening - 1] in ("=", "{", ",") or not _CONDITIONS.intersection(inside):
        return tokens
    return [*tokens[:opening], Token(","), *tokens[opening + 1 : -1]]
