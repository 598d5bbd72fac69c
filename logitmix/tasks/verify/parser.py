r"""The base of the parsers: it takes tokens one after the other, and limits the depth of brackets."""

from __future__ import annotations

from logitmix.tasks.verify.tokens import Token, Unreadable
from logitmix.tasks.verify.trees import Node

MAX_DEPTH = 40
SEPARATORS = frozenset((",", ";", "\\or", "\\and", "\\lor", "\\land"))
RELATIONS = frozenset("=<>≤≥≠≈∈⊆≡")
CLOSERS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
CLOSING = frozenset(CLOSERS.values())
# What ends an item of a list, and what ends a formula
ITEM_ENDS = SEPARATORS | CLOSING | frozenset(("&", "\\\\", "|"))
ENDS = ITEM_ENDS | RELATIONS | {":"}


class Parser:
    """A recursive-descent parser over tokens; subclasses read formulas, their operands and whole answers."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = list(tokens)
        self.place = 0
        self.depth = 0
        self.in_angle = self.in_bars = False

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

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"brackets are nested more than {MAX_DEPTH} deep")

    def answer(self) -> Node:
        """The whole answer, or the content of brackets."""
        raise NotImplementedError

    def bracketed(self, opener: str) -> Node:
        """The content of brackets, whose opening one is taken."""
        raise NotImplementedError

    def matrix(self, name: str) -> Node:
        raise NotImplementedError

    def sum(self) -> Node:
        raise NotImplementedError

    def exponent(self) -> Node:
        raise NotImplementedError

    def product(self) -> Node:
        raise NotImplementedError

    def power(self) -> Node:
        raise NotImplementedError

    def starts_factor(self) -> bool:
        raise NotImplementedError
