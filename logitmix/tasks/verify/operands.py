r"""The operands of formulas: numbers, letters, functions and commands such as `\frac`."""

from __future__ import annotations

import re
from fractions import Fraction

from logitmix.tasks.verify.parser import CLOSERS, Parser
from logitmix.tasks.verify.spellings import ACCENTS, ANGLES, FUNCTIONS, GREEK, INVERSES, LISTED
from logitmix.tasks.verify.tokens import JOINED, Token, Unreadable
from logitmix.tasks.verify.trees import Node, operation

_PIECES = re.compile("|".join(sorted([*FUNCTIONS, "pi", "infty"], key=len, reverse=True)) + "|[a-zA-Z]'*")


class Operands(Parser):
    """Numbers, letters, brackets and commands."""

    def primary(self) -> Node:
        self.enter()
        tree = self._primary()
        self.depth -= 1
        return tree

    def _primary(self) -> Node:
        token = self.take()
        if token in ("(", "[", "{", "\\{", "]"):
            return self.bracketed(token)
        if token in ("|", "\\lvert"):
            bars, self.in_bars = self.in_bars, token == "|"
            tree = self.sum()
            self.expect("|" if token == "|" else "\\rvert")
            self.in_bars = bars
            return operation("call", "abs", tree)
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
            return operation("/", top, self.argument())
        if token in ("\\sqrt", "\\surd", "cbrt"):
            index: Node = ("num", Fraction(2))
            if token == "\\sqrt" and self.peek() == "[":
                self.take()
                index = self.sum()
                self.expect("]")
            radicand = self.argument() if token == "\\sqrt" else self.primary()
            return operation("^", radicand, operation("/", ("num", Fraction(1)), index))
        if token == "\\binom":
            top = self.argument()
            return operation("call", "binom", top, self.argument())
        if token in ("\\lfloor", "\\lceil"):
            tree = self.sum()
            self.expect("\\r" + token[2:])
            return operation("call", token[2:], tree)
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
        return operation(name, start[2][0][1], start[2][1], end, self.product())

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
        return operation("lim", name, point, side, self.product())

    def function(self, name: str) -> Node:
        name = INVERSES.get(name, name)
        if name == "det":
            return operation("call", "det", self.primary())
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
        if self.peek() in CLOSERS:
            tree = self.primary()
            arguments = tree[-1] if tree[0] in ("tuple", "list", "set") and name in LISTED else (tree,)
        else:
            arguments = (self.bare_argument(),)
        self.in_angle = inside
        tree = operation("call", {"lg": "log"}.get(name, name), *arguments, *([base] if name in ("log", "lg") else []))
        return tree if exponent is None else operation("^", tree, exponent)

    def bare_argument(self) -> Node:
        r"""The argument of a function without brackets: `\sin 2x\cos y` is `\sin(2x)\cos(y)`."""
        self.enter()
        if self.peek() == "-":
            self.take()
            tree = operation("neg", self.bare_argument())
        else:
            tree = self.power()
            while self.starts_factor():
                if self.peek().isalpha() and len(self.peek()) > 1:
                    self.split_run()
                if self.peek().lstrip("\\") in FUNCTIONS or self.peek() in ("(", "["):
                    break
                tree = operation("*", tree, self.power())
        self.depth -= 1
        return tree


def read_number(token: str) -> Fraction:
    r"""The value of decimal digits, perhaps with a repeating part: `0.1(6)` for `0.1\overline{6}`."""
    digits, _, period = token.partition("(")
    number = Fraction(digits.removesuffix(".") or "0")
    if not period:
        return number
    period = period.rstrip(")")
    return number + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits.partition(".")[2]))
