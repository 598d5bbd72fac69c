r"""The grammar of answers: lists, sets, tuples, intervals, matrices, relations and words, made of formulas.

A structure is a node of a kind, a text and its parts:

    list     in any order; the text is what joins the parts      set      the same, in braces
    tuple    the text is its brackets: an interval or a point    rel      the operators, and the parts between them
    ∪ ∩ \setminus  of two sets                                     unit     a formula, and its unit
    words    letters only                                         name     a quantity such as |AB|, left of "="
    matrix   rows of cells                                        numbers  R, Z, ... by name
"""

from __future__ import annotations

import re
from functools import lru_cache

from logitmix.tasks.verify.formulas import Formulas
from logitmix.tasks.verify.parser import CLOSERS, CLOSING, ITEM_ENDS, RELATIONS, SEPARATORS
from logitmix.tasks.verify.spellings import FUNCTIONS, GREEK
from logitmix.tasks.verify.tokens import Token, Unreadable, tokenize
from logitmix.tasks.verify.trees import Node, has

_CURRENCIES = frozenset("$€£¥₹")
_AFTER_FRENCH = ITEM_ENDS | {"", "∪", "∩", "\\setminus"}  # "[" before these closes an interval
_SYMBOL = rf"(?:[a-zA-Z]|\\(?:{'|'.join(GREEK)}))'*(?:_(?:\{{[^{{}}]*\}}|[^{{}}])|'|\^\{{?(?:'|\*)\}}?)*"
_SEGMENT = (
    r"(?:\\(?:overline|vec|overrightarrow|widehat|bar|hat)\{?[a-zA-Z]+\}?|m?\\(?:angle|triangle)\{?[A-Z]{1,3}[0-9]?\}?"
    r"|[A-Z]{1,4}'?)"
)
_ATOM = rf"(?:\\Delta(?:{_SYMBOL})|{_SEGMENT}|{_SYMBOL})"
_ANY = r"[^()=]*(?:\([^()]*\)[^()]*)*(?:=[^()]*)?"
_NAME = re.compile(
    rf"{_ATOM}(?:\^\{{?-1\}}?|°)?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?"
    rf"|[A-Zfgh]'*(?:_\{{?\w+\}}?)?(?:\^\{{?-1\}}?)?\({_ANY}\)"
    rf"|(?:\||\\lvert)(?:{_ATOM}|[a-zA-Z][+-][a-zA-Z])(?:\||\\rvert)"
    rf"|\\frac\{{(?:\|?{_ATOM}\|?|d[a-z]?)\}}\{{(?:\|?{_ATOM}\|?|d[a-z])\}}|{_SEGMENT}[:/]{_SEGMENT}"
    rf"|\\?(?:sin|cos|tan|cot|sec|csc)(?:\^\{{?2\}}?)?{_ATOM}"
    r"|[A-Z](?:[∪∩][A-Z])+|\"?(?!(?:not?|or|and|n?either|never|maybe)\b)[A-Za-z]{2,}(?:\"[A-Za-z]+|[A-Za-z ])*(?:_\w)?"
)
_SIMPLE = re.compile(r"[a-zA-Z]'*|\\(?!pi\b)[a-zA-Z]+")

_WORDS: dict[str, Node] = {
    **dict.fromkeys(("allrealnumbers", "allreals", "reals", "realnumbers"), ("numbers", "R")),
    **dict.fromkeys(("emptyset", "nosolution", "nosolutions"), ("set", "", ())),
}


@lru_cache(maxsize=8192)
def read(tokens: tuple[Token, ...]) -> Node:
    """The tree of an answer. Raises `Unreadable` if the grammar does not read every token."""
    parser = _Answers(list(tokens))
    tree = parser.answer()
    if parser.peek():
        raise Unreadable(f"{parser.peek().strip(chr(34))!r} is left over")
    return tree


def read_text(text: str) -> Node:
    """The tree of an answer in LaTeX."""
    return read(tuple(tokenize(text)))


def plain(text: str) -> str:
    """Words without an article, case, blanks and punctuation."""
    return re.sub(r"^(?:the|an?)\b|[^a-z]", "", text.casefold())


class _Answers(Formulas):
    """Reads whole answers: formulas that separators, relations and brackets join."""

    in_head = False  # between the brace of {x | ...} and its bar

    def answer(self) -> Node:
        self.enter()
        groups, joiners = [[self.item()]], []
        while self.peek() in SEPARATORS:
            joiner = self.take()
            if joiner in (",", ";") and self.peek() in ("\\or", "\\and"):
                joiner = self.take()
            joiners.append(joiner)
            if joiner in (";", "\\or", "\\lor"):
                groups.append([])
            groups[-1].append(self.item())
        self.depth -= 1
        if not joiners:
            return groups[0][0]
        joiner = next((mark for mark in joiners if mark not in ",;"), ",")
        related = all(len(group) > 1 and all(part[0] == "rel" for part in group) for group in groups)
        if len(groups) > 1 and max(map(len, groups)) > 1 and (";" in joiners or related):
            groups = [[group[0] if len(group) == 1 else ("list", ",", tuple(group))] for group in groups]
        return ("list", joiner, tuple(part for group in groups for part in group))

    def item(self) -> Node:
        end = self.item_end()
        if self.place == end:
            raise Unreadable(f"nothing stands before {self.peek()!r}" if self.peek() else "the answer is cut off")
        if words := self.words(end):
            self.place = end
            return words
        parts = [self.side(end)]
        operators = []
        while self.peek() in RELATIONS:
            operators.append(self.take())
            parts.append(self.side(end))
        if self.peek() == "\\pmod":
            raise Unreadable("congruences are compared as text")
        if not operators:
            return parts[0]
        return ("rel", tuple(operators), tuple(parts))

    def item_end(self) -> int:
        """Where the part of the answer that begins here ends: at a separator or a closing bracket."""
        depth = 0
        for place in range(self.place + (self.peek() == "]"), len(self.tokens)):
            token = self.tokens[place].text
            if (depth == 0 and (token in ITEM_ENDS if token != "|" else self.in_head)) or (
                depth == 0 and token[:4] == "\\end"
            ):
                return place
            if token in CLOSERS or token.startswith("\\begin"):
                depth += 1
            elif token in CLOSING or token.startswith("\\end"):
                depth -= depth > 0
        return len(self.tokens)

    def words(self, end: int) -> Node | None:
        """Words, not a formula: as a product of letters they would equal their anagrams."""
        texts = [token.text for token in self.tokens[self.place : end]]
        bare = [text.strip('"') for text in texts]
        if bare[0] in "-." or not all(re.fullmatch(r"[a-zA-Z']+|[-.]", word) for word in bare):
            return None
        if any(word in FUNCTIONS for word in bare):
            return None
        if any(
            len(word) > 2 or (text[0] == '"' and len(word) > 1) for word, text in zip(bare, texts, strict=True)
        ) or [word.casefold() for word in bare] == ["no"]:
            text = plain(" ".join(bare))
            return _WORDS.get(text, ("words", text))
        if bare == ["R"] and end == len(self.tokens) and self.place == 0:
            return ("numbers", "R")
        return None

    def side(self, end: int) -> Node:
        """One side of a relation: a quantity by name, sets joined by ∪, or formulas, perhaps as a ratio."""
        depth, stop = 0, self.place
        while stop < end and (depth or self.tokens[stop].text not in RELATIONS):
            token = self.tokens[stop].text
            depth += (token in CLOSERS) - (token in CLOSING)
            stop += 1
        if stop < end and self.tokens[stop].text in ("=", "∈", "≈", "⊆"):
            text = "".join(token.text for token in self.tokens[self.place : stop])
            if _NAME.fullmatch(text):
                if _SIMPLE.fullmatch(text):
                    self.place = stop
                    return ("sym", text)
                return self.name(re.sub(r"([_^])\{(\w)\}", r"\1\2", text), stop)
        if any(len(token.text) > 3 or token.text[0] == '"' for token in self.tokens[self.place : stop]) and (
            words := self.words(stop)
        ):
            self.place = stop
            return words
        tree = self.sets()
        if self.peek() == ":" and not self.in_head:
            parts = [tree]
            while self.peek() == ":":
                self.take()
                parts.append(self.sets())
            if any(part[0] == "unit" and part[1] not in ("am", "pm") for part in parts):
                raise Unreadable("a ratio with a unit")
            return ("tuple", "::", tuple(parts))
        return tree

    def name(self, text: str, stop: int) -> Node:
        """A quantity by name, and the formula that it also is, such as the product in xy = 6."""
        inner = _Answers(self.tokens[self.place : stop])
        self.place = stop
        try:
            meaning = inner.sum()
        except Unreadable:
            return ("name", text, ("sym", text))
        return ("name", text, ("sym", text) if inner.peek() else meaning)

    def sets(self) -> Node:
        tree = self.amount()
        while self.peek() in ("∪", "∩", "\\setminus"):
            operator = self.take()
            tree = (operator, "", (tree, self.amount()))
        return tree

    def amount(self) -> Node:
        """A formula with its unit, before it or after it."""
        sign = self.take() if self.peek() in ("-", "+") and self.peek(1) in _CURRENCIES else ""
        unit = self.take() if self.peek() in _CURRENCIES else ""
        tree = self.sum()
        if sign == "-":
            tree = ("neg", tree)
        after = ""
        if self.peek() == "U" and self.peek(-1) in (")", "]", "\\}") and self.peek(1) in ("(", "[", "\\{"):
            self.tokens[self.place] = Token("∪")
        elif self.peek() in ("%", *_CURRENCIES):
            after = self.take()
        elif self.place < len(self.tokens) and (named := self.unit_ahead()) is not None:
            after, self.place = named
        if (unit and after) and after != unit and {"$": "?US"}.get(unit) != after:
            raise Unreadable("two units")
        if (unit or after) and (
            tree[0] in ("tuple", "list", "set", "rel", "matrix") or (has(tree, "deg") and after[:1] != "°")
        ):
            raise Unreadable("a unit of several values")
        return ("unit", unit or after, (tree,)) if unit or after else tree

    def bracketed(self, opener: str) -> Node:
        saved = self.in_bars, self.in_head
        self.in_bars, self.in_head = False, opener == "\\{"
        tree = self.inside(opener)
        self.in_bars, self.in_head = saved
        return tree

    def inside(self, opener: str) -> Node:
        if opener == "\\{" and self.peek() == "\\}":
            self.take()
            return ("set", "", ())
        if opener == "\\{" and self.peek() == "\\begin{array}":
            self.take()
            return self.matrix("cases", "array")
        head = self.answer()
        closer = self.take()
        if opener == "\\{" and closer in ("|", ":"):
            self.in_head = False
            condition = self.answer()
            self.expect("\\}")
            return condition
        if opener == "{" and closer == "\\choose":
            head = ("call", "binom", head, self.sum())
            closer = self.take()
        if opener in ("{", "\\{"):
            if closer != CLOSERS[opener]:
                raise Unreadable("a brace is open")
            return head if opener == "{" else ("set", "", head[2] if head[0] == "list" else (head,))
        if closer not in (")", "]", "[") or (closer == "[" and opener == "("):
            raise Unreadable("a bracket is open")
        if head[0] == "list" and head[1] in ",;":
            return ("tuple", opener + closer, head[2])
        if CLOSERS.get(opener) != closer:
            raise Unreadable(f"the brackets {opener} and {closer} do not match")
        return head

    def starts_factor(self) -> bool:
        if self.peek() == "U" and self.peek(-1) in (")", "]") and self.peek(1) in ("(", "["):
            return False
        if (self.peek() == "|" and self.in_head) or (self.peek() == "[" and self.peek(1) in _AFTER_FRENCH):
            return False
        return super().starts_factor()

    def matrix(self, name: str, environment: str = "") -> Node:
        """The content of \\begin and \\end: a matrix, or the lines of a system as a list."""
        environment = environment or name
        if name in ("array", "cases") and self.peek() == "{":
            self.braced()
        rows: list[list[Node]] = [[]]
        while True:
            rows[-1].append(self.answer())
            mark = self.take()
            if mark == "\\\\" and not self.peek().startswith("\\end{"):
                rows.append([])
            elif mark != "&":
                mark = self.take() if mark == "\\\\" else mark
                break
        if mark != f"\\end{{{environment}}}":
            raise Unreadable(f"{mark!r} is not expected in a matrix")
        if name == "cases":
            if any(len(row) > 1 for row in rows):
                raise Unreadable("a function by cases is compared as text")
            return ("list", "\\and", tuple(row[0] for row in rows))
        if len({len(row) for row in rows}) != 1 or name not in (
            "matrix",
            "pmatrix",
            "bmatrix",
            "Bmatrix",
            "vmatrix",
            "array",
        ):
            raise Unreadable(f"{name} is not read")
        tree = ("matrix", tuple(tuple(row) for row in rows))
        return ("call", "det", tree) if name == "vmatrix" else tree
