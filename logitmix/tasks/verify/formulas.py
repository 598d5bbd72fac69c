r"""Formulas: a small parser of LaTeX into trees. It raises `Unreadable` for what it does not support."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from logitmix.tasks.verify.tokens import ACCENTS, ALIASES, GREEK, INVERSES, NAMES, Unreadable, starts_factor, tokenize

MAX_DEPTH = 40
Node = tuple[Any, ...]


def parse(text: str) -> Node:
    """Parse a normalised formula. Raises `Unreadable` if it is none."""
    if not text.isascii():
        raise Unreadable("not ASCII")
    parser = _Parser(text)
    tree = parser.sum(0)
    if parser.peek():
        raise Unreadable(f"{parser.peek()!r} is left over")
    return tree


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = tokenize(text)
        self.place = 0
        self.in_bars = False

    def peek(self) -> str:
        if self.place < len(self.tokens) and self.tokens[self.place] == " ":
            following = self.tokens[self.place + 1 : self.place + 2]
            if not following or not following[0][0].isdigit():
                self.place += 1
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"{token!r} is missing")

    def sum(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.product(depth)
        while self.peek() in ("+", "-"):
            operator = self.take()
            tree = (operator, tree, self.product(depth))
        return tree

    def product(self, depth: int) -> Node:
        if self.peek() in ("+", "-"):
            sign = self.take()
            tree = self.product(depth)
            return ("-", tree) if sign == "-" else tree
        tree = self.power(depth)
        while True:
            if self.peek() in ("*", "/"):
                operator = self.take()
                if self.peek() in ("+", "-"):
                    sign = self.take()
                    right = self.power(depth)
                    tree = (operator, tree, ("-", right) if sign == "-" else right)
                else:
                    tree = (operator, tree, self.power(depth))
            elif self._starts_factor():
                tree = ("*", tree, self.power(depth))
            else:
                return tree

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":
            return not self.in_bars
        if token[:1].isdigit() or token[:1] == ".":
            # "x2" is not a product, but "x \cdot 2" and "\pi 2" are; digits never follow digits.
            return self.place > 0 and self.tokens[self.place - 1] in (")", "]", "}")
        return token in ("(", "[", "{") or token[:1].isalpha() or (token[:1] == "\\" and starts_factor(token[1:]))

    def power(self, depth: int) -> Node:
        tree = self.primary(depth)
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                if self.tokens[self.place : self.place + 3] in (["{", "\\circ", "}"],):
                    self.place += 3
                    tree = ("/", ("*", tree, ("constant", "pi")), ("number", Fraction(180)))
                else:
                    tree = ("power", tree, self.exponent(depth + 1))
            elif token == "!":
                self.take()
                tree = ("call", "!", tree)
            elif token == "\\%":
                self.take()
                tree = ("/", tree, ("number", Fraction(100)))
            else:
                return tree

    def exponent(self, depth: int) -> Node:
        """A group or one token; `2^-1` and `2^10` are read as if they had braces."""
        if self.peek() in ("+", "-"):
            sign = self.take()
            tree = self.exponent(depth)
            return ("-", tree) if sign == "-" else tree
        if self.peek() == "^":
            raise Unreadable("two carets")
        tree = self.primary(depth)
        if self.peek() == "^":
            self.take()
            return ("power", tree, self.exponent(depth + 1))
        return tree

    def group(self, depth: int) -> Node:
        """The argument of a command: a group in braces, or a single token."""
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        return self.primary(depth)

    def primary(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.take()
        if token in _CLOSERS:
            bars, self.in_bars = self.in_bars, False
            tree = self.sum(depth + 1)
            self.expect(_CLOSERS[token])
            self.in_bars = bars
            return tree
        if token == "|" and not self.in_bars:
            self.in_bars = True
            tree = self.sum(depth + 1)
            self.expect("|")
            self.in_bars = False
            return ("call", "abs", tree)
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return self.number(token)
        if token[:1].isalpha():
            if token in ("e", "i"):
                return self.subscripted(token, ("constant", token))
            return self.subscripted(token, ("symbol", token))
        if token[:1] == "\\":
            return self.command(token[1:], depth)
        raise Unreadable(f"{token!r} is not expected")

    def number(self, token: str) -> Node:
        number = read_number(token)
        if self.peek() == "_":  # 52_8: the digits in another base are a name of their own
            return self.subscripted(token, ("symbol", token))
        if "." in token:
            return ("number", number)
        rest = self.tokens[self.place :]
        if rest[:1] == [" "]:  # "1 1/2"
            if len(rest) >= 4 and rest[2] == "/" and rest[1].isdigit() and rest[3].isdigit():
                self.place += 4
                return ("number", number + _proper(rest[1], rest[3]))
            raise Unreadable("two numbers")
        fraction = "".join(rest[:7])
        match = re.fullmatch(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", fraction)
        if match and int(match[1]) < int(match[2]):
            self.place += 7
            return ("number", number + _proper(match[1], match[2]))
        return ("number", number)

    def subscripted(self, name: str, tree: Node) -> Node:
        if self.peek() != "_":
            return tree
        self.take()
        return ("symbol", f"{name}_{self.braced()}")

    def braced(self) -> str:
        """The literal text of a group."""
        if self.peek() != "{":
            return self.take()
        depth, text = 0, ""
        while True:
            token = self.take()
            if not token:
                raise Unreadable("a brace is open")
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return text[1:]
            text += token

    def command(self, name: str, depth: int) -> Node:
        if name == "frac":
            top = self.group(depth + 1)
            return ("/", top, self.group(depth + 1))
        if name == "sqrt":
            index: Node = ("number", Fraction(2))
            if self.peek() == "[":
                self.take()
                index = self.sum(depth + 1)
                self.expect("]")
            return ("power", self.group(depth + 1), ("/", ("number", Fraction(1)), index))
        if name == "binom":
            top = self.group(depth + 1)
            return ("call", "binom", top, self.group(depth + 1))
        if name in ("lfloor", "lceil"):
            tree = self.sum(depth + 1)
            self.expect("\\r" + name[1:])
            return ("call", name[1:], tree)
        if name in NAMES:
            return self.function(name, depth)
        if name == "pi":
            return ("constant", "pi")
        if GREEK.fullmatch(name):
            return self.subscripted(name, ("symbol", name))
        if ACCENTS.fullmatch(name):
            name = f"{name} {self.braced()}"
            return self.subscripted(name, ("symbol", name))
        raise Unreadable(f"\\{name} is not known")

    def function(self, name: str, depth: int) -> Node:
        name = ALIASES.get(name, name)
        exponent: Node | None = None
        base: Node = ("number", Fraction(10))
        for _ in range(2):
            if self.peek() == "_" and name == "log":
                self.take()
                base = self.group(depth + 1)
            elif self.peek() == "^":
                self.take()
                exponent = self.exponent(depth + 1)
        if exponent == ("-", ("number", Fraction(1))) and name in INVERSES:
            name, exponent = INVERSES[name], None
        if self.peek() in ("(", "{", "["):
            opener = self.take()
            arguments = [self.sum(depth + 1)]
            while self.peek() == "," and name in ("max", "min"):
                self.take()
                arguments.append(self.sum(depth + 1))
            self.expect(_CLOSERS[opener])
        else:
            arguments = [self.argument(depth + 1)]
        if name == "sqrt":
            tree: Node = ("power", arguments[0], ("number", Fraction(1, 2)))
        elif name == "log":
            tree = ("call", "log", arguments[0], base)
        else:
            tree = ("call", name, *arguments)
        return tree if exponent is None else ("power", tree, exponent)

    def argument(self, depth: int) -> Node:
        r"""The argument of a function without brackets: `\sin 2x\cos y` is `\sin(2x)\cos(y)`."""
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        if self.peek() == "-":
            self.take()
            return ("-", self.argument(depth))
        tree = self.power(depth)
        while self._starts_factor() and self.peek().lstrip("\\") not in NAMES and self.peek() not in ("(", "["):
            tree = ("*", tree, self.power(depth))
        return tree


_CLOSERS = {"(": ")", "[": "]", "{": "}"}


def _proper(top: str, bottom: str) -> Fraction:
    if int(bottom) == 0 or int(top) >= int(bottom):
        raise Unreadable("no mixed number")
    return Fraction(int(top), int(bottom))


def read_number(token: str) -> Fraction:
    r"""The value of decimal digits, perhaps with a repeating part: `0.1\overline{6}`."""
    digits, _, repeating = token.partition("\\overline")
    number = Fraction(digits.removesuffix(".") or "0")
    if not repeating:
        return number
    if "." not in digits:
        raise Unreadable("a repeating part without a decimal point")
    period = repeating.strip("{}")
    return number + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits.partition(".")[2]))


def symbols(tree: Node) -> set[str]:
    return _leaves(tree, "symbol")


def constants(tree: Node) -> set[str]:
    return _leaves(tree, "constant")


def _leaves(tree: Node, kind: str) -> set[str]:
    if tree[0] == kind:
        return {tree[1]}
    return set().union(*(_leaves(part, kind) for part in tree[1:] if isinstance(part, tuple)))
