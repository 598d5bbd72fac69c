r"""The grammar of formulas: sums, products, powers, functions and what stands in brackets, as a small tree.

A node is a tuple, its kind first: `("num", Fraction)`, `("sym", name)`, `("const", "pi")`, `("+", left, right)`,
`("call", name, arguments...)`. Kinds in `STRUCTURES` are answers with parts, which no operator takes (`answers.py`).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from logitmix.tasks.verify.tokens import (
    ANGLES,
    CALLS,
    FUNCTIONS,
    GREEK,
    INVERSES,
    JOINED,
    LISTED,
    MARKUP,
    Token,
    Unreadable,
)
from logitmix.tasks.verify.units import MULTIPLIERS, unit_of

MAX_DEPTH = 40
Node = tuple[Any, ...]
STRUCTURES = frozenset({"list", "set", "tuple", "∪", "∩", "\\setminus", "rel", "words", "name", "unit", "numbers"})
CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
ACCENTS = frozenset(
    "\\overline \\bar \\vec \\hat \\tilde \\dot \\mathcal \\overrightarrow \\widehat \\mathbb \\angle \\triangle".split()
)
_FACTORS = frozenset(
    "\\frac \\sqrt \\surd \\binom \\lfloor \\lceil \\lvert \\sum \\prod \\lim \\det \\pi ∞ ( [ { \\boxed".split()
) | {f"\\begin{{{kind}matrix}}" for kind in ("", "p", "b", "B", "v")}
_PIECES = re.compile("|".join(sorted([*FUNCTIONS, "pi", "infty"], key=len, reverse=True)) + "|[a-zA-Z]'*")
_ENDS = frozenset(") ] } \\} , ; = < > ≤ ≥ ≠ ≈ ∈ : & \\\\ \\or \\and \\lor \\land |".split())


class Formulas:
    """A recursive-descent parser over tokens. `answer` reads what stands in brackets."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = list(tokens)
        self.place = 0
        self.depth = 0
        self.in_angle = self.in_bars = False

    def answer(self) -> Node:
        raise NotImplementedError

    def matrix(self, name: str) -> Node:
        raise NotImplementedError

    # Tokens

    def peek(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place].text if 0 <= place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        found = self.take()
        if found != token:
            raise Unreadable(f"{token!r} is missing" if not found else f"{found!r} is not expected")

    def gap(self) -> int:
        return self.tokens[self.place].gap

    # Operators

    def sum(self) -> Node:
        tree = self.product()
        while (operator := self.peek()) in ("+", "-", "±", "∓") and operator:
            self.take()
            right = self.product()
            tree = _node("pm", operator, tree, right) if operator in "±∓" else _node(operator, tree, right)
        return tree

    def product(self, signed: bool = False) -> Node:
        if (sign := self.peek()) in ("+", "-", "±", "∓") and sign:
            if sign in "+-" and (signed or (self.peek(-1) == sign and not self.gap())):
                raise Unreadable("two signs")
            self.take()
            tree = self.product(signed=True)
            return tree if sign == "+" else _node("neg", tree) if sign == "-" else _node("pm", sign, tree)
        tree = self.power()
        while True:
            token = self.peek()
            if token in ("*", "/", "\\bmod") and token:
                self.take()
                sign = self.take() if self.peek() in ("+", "-") else ""
                right = _node("neg", self.power()) if sign == "-" else self.power()
                tree = _node("call", "mod", tree, right) if token == "\\bmod" else _node(token, tree, right)
            elif (power := MULTIPLIERS.get(token.strip('"'))) and self.peek(-1)[-1:].isdecimal():
                self.take()
                tree = _node("*", tree, ("num", Fraction(10**power)))
            elif self.starts_factor():
                tree = _node("*", tree, self.power())
            else:
                return tree

    def starts_factor(self) -> bool:
        token, before = self.peek(), self.peek(-1)
        if not token:
            return False
        if token == "|":
            return not self.in_bars
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            # "x2" is no product, but "\sqrt{x}2" is; digits never follow digits, nor markup that is dropped.
            return before in (")", "]", "}") and self.gap() < MARKUP and token not in ("0", "1")
        if token == "\\boxed" or (token == "{" and before[-1:].isdecimal() and self.peek(1)[:1].isdecimal()):
            raise Unreadable("a box or a number follows without an operator")
        if token[0].isalpha():
            return self.unit_ahead() is None
        return token in _FACTORS or token in ACCENTS or token[1:] in GREEK or token[1:] in FUNCTIONS

    def unit_ahead(self) -> str | None:
        """The unit or counted thing that the rest of this part of the answer names, if it does."""
        before = self.peek(-1)
        if not (before[-1:].isdecimal() or before in (")", "}", "\\pi", "°") or (before[:1].isalpha() and self.gap())):
            return None
        end = self.place
        while end < len(self.tokens) and (self.tokens[end].text not in _ENDS or self.tokens[end].text == "}"):
            if self.tokens[end].text == "}" and not any(t.text == "{" for t in self.tokens[self.place : end]):
                break
            end += 1
        return unit_of(self.tokens[self.place : end]) if end > self.place else None

    def power(self) -> Node:
        tree = self.primary()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                tree = _node("^", tree, self.exponent())
            elif token == "!":
                self.take()
                tree = _node("call", "!", tree)
            elif token == "°":
                self.take()
                if tree[0] == "deg":
                    raise Unreadable("degrees twice")
                turn = ("/", ("*", tree, ("const", "pi")), ("num", Fraction(180)))
                tree = turn if self.in_angle else _node("deg", tree)
            elif token == "%" and self.peek(1) in ("+", "-", "*", "/", "^") and self.peek(1):
                self.take()
                tree = _node("/", tree, ("num", Fraction(100)))
            else:
                return tree

    def exponent(self) -> Node:
        """A group or one token; `2^-1` and `2^10` are read as if they had braces."""
        self.enter()
        if (sign := self.peek()) in ("+", "-") and sign:
            self.take()
            tree = self.exponent()
            tree = _node("neg", tree) if sign == "-" else tree
        else:
            tree = self.primary()
            if self.peek() == "^":
                self.take()
                tree = _node("^", tree, self.exponent())
        self.depth -= 1
        return tree

    # Operands

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"brackets are nested more than {MAX_DEPTH} deep")

    def primary(self) -> Node:
        self.enter()
        tree = self._primary()
        self.depth -= 1
        return tree

    def _primary(self) -> Node:
        token = self.take()
        if token in ("(", "[", "{", "\\{", "]") and token:
            return self.bracketed(token)
        if token in ("|", "\\lvert"):
            bars, self.in_bars = self.in_bars, token == "|"
            tree = self.sum()
            self.expect("|" if token == "|" else "\\rvert")
            self.in_bars = bars
            return _node("call", "abs", tree)
        if token[:1].isdecimal() or (token[:1] == "." and len(token) > 1 and token[1].isdecimal()):
            return self.number(token)
        if token == "∞":
            return ("inf",)
        if token == "∅":
            return ("set", "", ())
        if token in FUNCTIONS or (token[1:] in FUNCTIONS and token != "\\sqrt"):
            return self.function(token.lstrip("\\"))
        if token[:1].isalpha() and token.isascii():
            return self.letter(token)
        return self.command(token)

    def bracketed(self, opener: str) -> Node:
        raise NotImplementedError

    def argument(self) -> Node:
        r"""The argument of a command: a group in braces, or a single digit, letter or command, as in `\frac12`."""
        token = self.peek()
        if len(token) > 1 and token.isdecimal():
            self.tokens[self.place : self.place + 1] = [Token(token[0]), Token(token[1:])]
        elif len(token) > 1 and token.isalpha() and token.isascii():
            self.split_run()
        return self.primary()

    def braced(self) -> str:
        """The literal text of a group, or one token."""
        if self.peek() != "{":
            return self.take()
        self.take()
        depth, text = 1, ""
        while True:
            token = self.take()
            if not token:
                raise Unreadable("a brace is open")
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return text
            text += token.strip('"')

    def number(self, token: str) -> Node:
        value = read_number(token)
        if self.peek() == "_":  # 52_8: the digits in another base are a name of their own
            self.take()
            return ("sym", f"{token}_{self.braced()}")
        if "." in token and self.peek() == "(" and self.peek(1).isdecimal() and self.peek(2) == ")":
            raise Unreadable("a repeating part or a product")
        if token.isdecimal() and self.peek() == "\\frac":
            place, fraction = self.place, self.power()
            if (
                fraction[0] == "/"
                and fraction[1][0] == fraction[2][0] == "num"
                and 0 < fraction[1][1] < fraction[2][1]
            ):
                return ("num", value + fraction[1][1] / fraction[2][1])
            self.place = place
        if (
            token.isdecimal()
            and self.peek().isdecimal()
            and self.peek(1) == "/"
            and self.peek(2).isdecimal()
            and self.gap() == 1
        ):
            top, low = int(self.peek()), int(self.peek(2))
            if not 0 < top < low:
                raise Unreadable("two numbers")
            self.place += 3
            return ("num", value + Fraction(top, low))
        return ("num", value, token) if "." in token else ("num", value)

    def split_run(self) -> None:
        r"""`sinx` is `\sin x` and `xy` is x times y, but a longer run of letters is a word, not a product."""
        run = self.peek()
        pieces = _PIECES.findall(run)
        single = "".join("." if len(piece.strip("'")) == 1 else " " for piece in pieces)
        if "....." in single:
            raise Unreadable(f"{run!r} is a word")
        gap = self.gap()
        self.tokens[self.place : self.place + 1] = [
            Token({"pi": "\\pi", "infty": "∞"}.get(piece, piece), JOINED if i else gap)
            for i, piece in enumerate(pieces)
        ]

    def letter(self, token: str) -> Node:
        if len(token.strip("'")) > 1:
            self.place -= 1
            self.split_run()
            return self._primary()
        name = token
        if self.peek() == "_":
            self.take()
            below = self.braced()
            if token in "CAP" and self.peek() == "^" and (choice := self.choice(token, below)):
                return choice
            name = f"{token}_{below}"
        if name in ("e", "i"):
            return ("const", name)
        if self.peek() == "(" and token[0].isupper() | (token[0] in "fg") and self.gap() == JOINED:
            place = self.place
            inside = self.primary()
            if token[0] in "fgFG":
                return ("apply", name, *(inside[2] if inside[0] in ("tuple", "list") else (inside,)))
            if inside[0] == "tuple":
                return ("rel", ("=",), (("sym", name), inside))  # the point A(1, 2)
            self.place = place
        return ("sym", name)

    def choice(self, letter: str, below: str) -> Node | None:
        """`C_5^2` is a binomial coefficient, and `A_5^2` or `P_5^2` the number of arrangements."""
        place = self.place
        self.take()
        above = self.braced()
        if below.isdecimal() and above.isdecimal() and int(above) <= int(below):
            node = ("call", "binom", ("num", Fraction(below)), ("num", Fraction(above)))
            return node if letter == "C" else ("*", node, ("call", "!", node[3]))
        self.place = place
        return None

    def command(self, token: str) -> Node:
        if token == "\\frac":
            top = self.argument()
            return _node("/", top, self.argument())
        if token in ("\\sqrt", "\\surd", "cbrt"):
            index: Node = ("num", Fraction(2))
            if token == "\\sqrt" and self.peek() == "[":
                self.take()
                index = self.sum()
                self.expect("]")
            radicand = self.argument() if token == "\\sqrt" else self.primary()
            return _node("^", radicand, _node("/", ("num", Fraction(1)), index))
        if token == "\\binom":
            top = self.argument()
            return _node("call", "binom", top, self.argument())
        if token in ("\\lfloor", "\\lceil"):
            tree = self.sum()
            self.expect("\\r" + token[2:])
            return _node("call", token[2:], tree)
        if token in ("\\sum", "\\prod"):
            return self.series(token[1:])
        if token == "\\lim":
            return self.limit()
        if token == "\\boxed":
            return self.argument()
        if token == "\\pi":
            return ("const", "pi")
        if token.startswith("\\begin{"):
            return self.matrix(token[7:-1])
        if token == "\\R":
            return ("numbers", "R")
        if token in ACCENTS or token[1:] in GREEK:
            name = f"{token} {self.braced()}" if token in ACCENTS else token
            if token == "\\mathbb":
                return ("numbers", name[-1])
            if self.peek() == "_":
                self.take()
                name = f"{name}_{self.braced()}"
            return ("sym", name)
        raise Unreadable(f"{token!r} is not expected" if token else "the answer is cut off")

    def series(self, name: str) -> Node:
        r"""`\sum_{k=1}^{4} k`: the product after it is its body."""
        self.expect("_")
        start = self.argument()
        self.expect("^")
        end = self.exponent()
        if start[0] != "rel" or start[1] != ("=",) or start[2][0][0] != "sym":
            raise Unreadable(f"\\{name} has no index")
        return _node(name, start[2][0][1], start[2][1], end, self.product())

    def limit(self) -> Node:
        r"""`\lim_{x\to 0} \frac{\sin x}{x}`, also from one side: `0^+`."""
        self.expect("_")
        self.expect("{")
        name = self.take()
        self.expect("→")
        point = self.product() if self.peek() == "-" else self.primary()
        side = ""
        if self.peek() == "^":
            self.take()
            side = self.braced()
        self.expect("}")
        return _node("lim", name, point, side, self.product())

    def function(self, name: str) -> Node:
        name = INVERSES.get(name, name)
        if name == "det":
            return _node("call", "det", self.primary())
        exponent: Node | None = None
        base: Node = ("num", Fraction(10))
        for _ in range(2):
            if self.peek() == "_" and name == "log":
                self.take()
                base = self.argument() if self.peek() == "{" else self.primary()
            elif self.peek() == "^":
                self.take()
                exponent = self.exponent()
        if exponent == ("neg", ("num", Fraction(1))) and name in ANGLES:
            name, exponent = f"a{name}", None
        inside, self.in_angle = self.in_angle, self.in_angle or name in ANGLES
        if self.peek() in CLOSERS and self.peek():
            tree = self.primary()
            arguments = tree[-1] if tree[0] in ("tuple", "list", "set") and name in LISTED else (tree,)
        else:
            arguments = (self.bare_argument(),)
        self.in_angle = inside
        tree = _node("call", {"lg": "log"}.get(name, name), *arguments, *([base] if name in ("log", "lg") else []))
        return tree if exponent is None else _node("^", tree, exponent)

    def bare_argument(self) -> Node:
        r"""The argument of a function without brackets: `\sin 2x\cos y` is `\sin(2x)\cos(y)`."""
        self.enter()
        if self.peek() == "-":
            self.take()
            tree = _node("neg", self.bare_argument())
        else:
            tree = self.power()
            while self.starts_factor():
                if self.peek().isalpha() and len(self.peek()) > 1:
                    self.split_run()
                if self.peek().lstrip("\\") in FUNCTIONS or self.peek() in ("(", "["):
                    break
                tree = _node("*", tree, self.power())
        self.depth -= 1
        return tree


def _node(kind: str, *parts: Any) -> Node:
    """A node of an operator or function, which takes no structure."""
    for part in parts:
        if isinstance(part, tuple) and part[0] in STRUCTURES:
            raise Unreadable(f"a {part[0]} stands where a number is expected")
    return (kind, *parts)


def read_number(token: str) -> Fraction:
    r"""The value of decimal digits, perhaps with a repeating part: `0.1(6)` for `0.1\overline{6}`."""
    digits, _, period = token.partition("(")
    number = Fraction(digits.removesuffix(".") or "0")
    if not period:
        return number
    period = period.rstrip(")")
    return number + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits.partition(".")[2]))


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
