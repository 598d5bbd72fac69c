r"""The grammar of formulas: sums, products, powers, and the units after them."""

from __future__ import annotations

from fractions import Fraction

from logitmix.tasks.verify.operands import Operands
from logitmix.tasks.verify.parser import ENDS
from logitmix.tasks.verify.spellings import ACCENTS, FUNCTIONS, GREEK
from logitmix.tasks.verify.tokens import MARKUP, Unreadable
from logitmix.tasks.verify.trees import Node, operation
from logitmix.tasks.verify.units import MULTIPLIERS, unit_of

_FACTORS = frozenset(
    ("∞", "(", "[", "{", "\\boxed", *(f"\\begin{{{kind}matrix}}" for kind in ("", "p", "b", "B", "v")))
) | {f"\\{name}" for name in ("frac", "sqrt", "surd", "binom", "lfloor", "lceil", "lvert", "sum", "prod", "lim", "pi")}


class Formulas(Operands):
    """Sums, products and powers."""

    def sum(self) -> Node:
        tree = self.product()
        while (operator := self.peek()) in ("+", "-", "±", "∓"):
            self.take()
            right = self.product()
            tree = operation("pm", operator, tree, right) if operator in "±∓" else operation(operator, tree, right)
        return tree

    def product(self, signed: bool = False) -> Node:
        if (sign := self.peek()) in ("+", "-", "±", "∓"):
            if sign in "+-" and (signed or (self.peek(-1) == sign and not self.gap())):
                raise Unreadable("two signs")
            self.take()
            tree = operation("neg", self.product(signed=True))[1]
            return tree if sign == "+" else operation("neg", tree) if sign == "-" else operation("pm", sign, tree)
        tree = self.power()
        while True:
            token = self.peek()
            if token in ("*", "/", "\\bmod"):
                self.take()
                sign = self.take() if self.peek() in ("+", "-") else ""
                right = operation("neg", self.power()) if sign == "-" else self.power()
                tree = operation("call", "mod", tree, right) if token == "\\bmod" else operation(token, tree, right)
            elif (power := MULTIPLIERS.get(token.strip('"'))) and self.peek(-1)[-1:].isdecimal():
                self.take()
                tree = operation("*", tree, ("num", Fraction(10**power)))
            elif self.starts_factor():
                tree = operation("*", tree, self.power())
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

    def unit_ahead(self) -> tuple[str, int] | None:
        """The unit or counted thing that the rest of this part of the answer names, if it does, and where it ends."""
        before, opened = self.peek(-1), 0
        if not (before[-1:].isdecimal() or before in (")", "}", "\\pi", "°") or (before[:1].isalpha() and self.gap())):
            return None
        end = self.place
        while end < len(self.tokens) and (opened or self.tokens[end].text not in ENDS):
            opened += (self.tokens[end].text == "{") - (self.tokens[end].text == "}")
            end += 1
        unit = unit_of(self.tokens[self.place : end]) if end > self.place else None
        if unit is None or (unit[:1] == "?" and before[:1].isalpha()):  # letters are not counted
            return None
        return unit, end

    def power(self) -> Node:
        tree = self.primary()
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                tree = operation("^", tree, self.exponent())
            elif token == "!":
                self.take()
                tree = operation("call", "!", tree)
            elif token == "°":
                self.take()
                if tree[0] == "deg":
                    raise Unreadable("degrees twice")
                turn = ("/", ("*", tree, ("const", "pi")), ("num", Fraction(180)))
                tree = turn if self.in_angle else operation("deg", tree)
            elif token == "%" and self.peek(1) in ("+", "-", "*", "/", "^"):
                self.take()
                tree = operation("/", tree, ("num", Fraction(100)))
            else:
                return tree

    def exponent(self, signed: bool = False) -> Node:
        """A group or one token; `2^-1` and `2^10` are read as if they had braces."""
        self.enter()
        if (sign := self.peek()) in ("+", "-"):
            if signed:
                raise Unreadable("two signs")
            self.take()
            tree = self.exponent(signed=True)
            tree = operation("neg", tree) if sign == "-" else tree
        else:
            tree = self.primary()
            if self.peek() == "^":
                self.take()
                tree = operation("^", tree, self.exponent())
        self.depth -= 1
        return tree
