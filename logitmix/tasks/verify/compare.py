r"""Compares two answers: which rule decides, by the kinds of both. docs/verifier.md has the table of kinds.

A `Comparison` keeps its steps, which `logitmix verify` prints. `lenient` also accepts what people often, but not
always, call equal: an angle in degrees and in radians, a ratio and a fraction, a decimal of three digits and its exact
value, a tuple in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from logitmix.tasks.verify.answers import read
from logitmix.tasks.verify.choices import same_choice
from logitmix.tasks.verify.evaluation import Undefined
from logitmix.tasks.verify.lists import expanded, same_collection, same_matrix
from logitmix.tasks.verify.reals import describes_set, same_reals
from logitmix.tasks.verify.relations import coordinates, name_of, same_relation, simplified
from logitmix.tasks.verify.tokens import Token, Unreadable, text_of, tokenize
from logitmix.tasks.verify.trees import Node, has, substitute, symbols
from logitmix.tasks.verify.units import same_unit
from logitmix.tasks.verify.values import constant, equal, rounded

_COLLECTIONS = frozenset({"list", "set", "tuple"})
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMBERS = {word: ("num", Fraction(value)) for value, word in enumerate(_WORDS)}
_INTEGERS = frozenset({"k", "n", "m", "l", "an integer"})
_INFINITE: tuple[Node, ...] = (("inf",), ("neg", ("inf",)))
_NUMBER_SETS = [(kind, name) for kind in ("numbers", "sym") for name in "ZNR"]
_PI: Node = ("const", "pi")


class Step(NamedTuple):
    """One comparison of two parts: the rule that decided, and the verdict."""

    depth: int
    left: Node
    right: Node
    rule: str
    verdict: bool


class Comparison:
    """Compares a prediction with a gold. `unread` is the reason if a part could not be compared."""

    def __init__(self, lenient: bool = False) -> None:
        self.lenient = lenient
        self.steps: list[Step] = []
        self.unread: str | None = None
        self.depth = 0

    def same_tokens(self, prediction: list[Token], gold: list[Token]) -> bool:
        """Whether two answers are equal; False with `unread` if one of them is not read."""
        texts = [[token.text for token in side] for side in (prediction, gold)]
        if not all(texts):
            return False
        if texts[0] == texts[1]:
            return self._decided((), (), "the same tokens", True)
        spelled = text_of(prediction), text_of(gold)
        choice = same_choice(
            spelled[0], spelled[1], lambda one, other: self.same_tokens(tokenize(one), tokenize(other))
        )
        if choice is not None:
            return self._decided((), (), "a choice is its letter", choice)
        if len(texts[0]) == 3 and texts[0][1] == "," and "".join(texts[0]).replace(",", ".") == spelled[1]:
            return self._decided((), (), "a decimal comma", True)
        trees, reasons = [], []
        for side in (prediction, gold):
            try:
                trees.append(read(tuple(side)))
            except Unreadable as error:
                reasons.append(str(error))
        if len(trees) == 2:
            return self.same(*trees)
        self.unread = reasons[0]
        if len(reasons) == 2 and _words(prediction) == _words(gold):
            return self._decided((), (), "the same text, in words or in a formula", True)
        return False

    def same(self, left: Node, right: Node) -> bool:
        """Whether two trees are equal."""
        if self.depth > 60:
            self.unread = "the answer is nested too deep"
            return False
        self.depth += 1
        try:
            left, right = self._simplified(left), self._simplified(right)
            rule, compare = self._rule(left, right)
            verdict = compare(left, right)
        except (Unreadable, Undefined) as error:
            self.unread, rule, verdict = str(error), f"not compared: {error}", False
        finally:
            self.depth -= 1
        return self._decided(left, right, rule, verdict)

    def _decided(self, left: Node, right: Node, rule: str, verdict: bool) -> bool:
        self.steps.append(Step(self.depth, left, right, rule, verdict))
        return verdict

    def _rule(self, left: Node, right: Node) -> tuple[str, Callable[[Node, Node], bool]]:
        """The rule for two kinds, the first that fits."""
        kinds = {left[0], right[0]}
        if left == right or kinds == {"words"}:
            return "words and equal trees are compared letter by letter", lambda one, other: one == other
        if describes_set(left) or describes_set(right):
            try:
                verdict = same_reals(left, right)
            except (Unreadable, Undefined):
                pass  # a set of something else, or an inequality that is not solved
            else:
                both = symbols(left)
                # a > b and b < a are sets of different variables
                if verdict or kinds != {"rel"} or len(both) < 2 or both != symbols(right):
                    return "sets of real numbers are equal as sets", lambda one, other: verdict
        if any(tree[0] == "rel" and tree[1] == ("∈",) and name_of(tree) for tree in (left, right)):
            return "a member's set is the set", self._same_members
        if kinds == {"rel", "list"} or (kinds & _COLLECTIONS and "rel" not in kinds):
            if kinds == {"matrix", "tuple"}:
                return "a vector may be a tuple", lambda one, other: same_matrix(one, other, self.same)
            if self.lenient and "::" in (left[1], right[1]) and len(kinds) == 2:
                return "a ratio may be a fraction", self._same_ratio
            return "collections are compared part by part", self._same_collection
        if "rel" in kinds:
            return "a named value is its value; equations are equal up to a factor", self._same_relation
        if kinds & {"∪", "∩", "\\setminus", "numbers"}:
            return "sets that are no intervals are compared part by part", self._same_parts
        if "words" in kinds:
            return "words are no formula, except the numbers to twelve", self._same_number_word
        return "formulas are equal if their values are", self.same_formula

    def _simplified(self, tree: Node) -> Node:
        if tree[0] == "name":
            return ("sym", tree[1])
        variants = expanded(tree)
        tree = variants[0] if len(variants) == 1 else ("list", "\\or", variants)
        if tree[0] == "list":
            tree = _without_conditions(tree)
        return simplified(tree, self.same) if tree[0] == "rel" else tree

    def _same_members(self, left: Node, right: Node) -> bool:
        if left[0] == right[0] == "rel":
            return left[1] == right[1] and left[2][0] == right[2][0] and self.same(left[2][1], right[2][1])
        return self.same(*(tree[2][1] if tree[0] == "rel" else tree for tree in (left, right)))

    def _same_collection(self, left: Node, right: Node) -> bool:
        left, right = coordinates(left), coordinates(right)
        return same_collection(left, right, self.same, ordered=not self.lenient, inside=self.depth > 1)

    def _same_relation(self, left: Node, right: Node) -> bool:
        return same_relation(left, right, self.same)

    def _same_parts(self, left: Node, right: Node) -> bool:
        if left[0] != right[0] or left[1] != right[1]:
            return False
        return left[0] != "numbers" and all(self.same(*pair) for pair in zip(left[2], right[2], strict=True))

    def _same_ratio(self, left: Node, right: Node) -> bool:
        ratio, other = (left, right) if left[1] == "::" else (right, left)
        return len(ratio[2]) == 2 and other[0] not in _COLLECTIONS and self.same(("/", *ratio[2]), other)

    def _same_number_word(self, left: Node, right: Node) -> bool:
        pair = [_NUMBERS.get(side[1], side) if side[0] == "words" else side for side in (left, right)]
        return "words" not in (pair[0][0], pair[1][0]) and self.same(*pair)

    def same_formula(self, left: Node, right: Node) -> bool:
        """Whether two formulas have the same value and no different units."""
        units = _unit(left), _unit(right)
        left, right = ((tree[2][0] if tree[0] == "unit" else tree) for tree in (left, right))
        if units[0] != units[1] and "sym" in (left[0], right[0]):
            return False  # a letter alone has no unit
        if left in _INFINITE or right in _INFINITE:
            return left == right
        if self.lenient and self._same_angle(left, right, units):
            return True
        if not same_unit(*units):
            return False
        if equal(left, right) or self._same_family(left, right):
            return True
        for one, other, unit, without in ((left, right, units[0], units[1]), (right, left, units[1], units[0])):
            if unit == "%" and not without and equal(("/", one, ("num", Fraction(100))), other):
                return True  # "50%" and "50", where the question asks for a percentage, or "0.5"
            if self._is_rounded(one, other):
                return True
        return False

    def _is_rounded(self, decimal: Node, exact: Node) -> bool:
        text, shift = _decimal(decimal)
        if not text or _decimal(exact)[0] or symbols(exact):
            return False
        shifted = ("/", exact, ("^", ("num", Fraction(10)), ("num", Fraction(shift)))) if shift else exact
        return rounded(text, constant(shifted), digits_needed=3 if self.lenient else 6)

    def _same_angle(self, left: Node, right: Node, units: tuple[str, str]) -> bool:
        for one, other, unit, without in ((left, right, units[0], units[1]), (right, left, units[1], units[0])):
            if (
                unit == "°"
                and without in ("", "radian")
                and equal(("/", ("*", one, _PI), ("num", Fraction(180))), other)
            ):
                return True
        return False

    def _same_family(self, left: Node, right: Node) -> bool:
        """Whether two formulas differ in the name of an integer only, as in k and n of a period."""
        alone = symbols(left) - symbols(right), symbols(right) - symbols(left)
        if any(len(names) != 1 or not names <= _INTEGERS for names in alone):
            return False
        one, other = next(iter(alone[0])), next(iter(alone[1]))
        if "an integer" not in (one, other) and not (_is_periodic(left, one) and _is_periodic(right, other)):
            return False
        return equal(left, substitute(right, other, ("sym", one)))


def _unit(tree: Node) -> str:
    """The unit of a formula; empty if it has none."""
    return str(tree[1]) if tree[0] == "unit" else "°" if has(tree, "deg") else ""


def _decimal(tree: Node) -> tuple[str, int]:
    """The digits of a decimal number, and its power of ten: 6.02 and 23 for 6.02 * 10^23."""
    if tree[0] == "neg":
        text, shift = _decimal(tree[1])
        return (f"-{text}" if text and text[0] != "-" else ""), shift
    if tree[0] == "num" and len(tree) == 3 and re.fullmatch(r"[0-9.]+", tree[2]):
        return tree[2], 0
    if tree[0] == "*" and tree[2][0] == "^" and tree[2][1] == ("num", Fraction(10)):
        exponent, sign = (tree[2][2][1], -1) if tree[2][2][0] == "neg" else (tree[2][2], 1)
        if exponent[0] == "num" and exponent[1].denominator == 1 and exponent[1] < 100:
            return _decimal(tree[1])[0], sign * int(exponent[1])
    return "", 0


def _words(tokens: list[Token]) -> list[str]:
    """Words, digits and signs of a text, the same with and without LaTeX's markup of words."""
    return re.findall(r"\\?[a-zA-Z]+|\S", " ".join(token.text for token in tokens).replace('"', ""))


def _without_conditions(tree: Node) -> Node:
    r"""A list without conditions such as `k\in\mathbb{Z}`, whose k then is an integer by any name."""
    parts = list(tree[2])
    for part in tree[2]:
        is_condition = part[0] == "rel" and part[1] == ("∈",) and part[2][0][0] == "sym" and part[2][1] in _NUMBER_SETS
        if is_condition and len(parts) > 1:
            parts.remove(part)
            if part[2][1][1] != "R":
                parts = [substitute(other, part[2][0][1], ("sym", "an integer")) for other in parts]
    return parts[0] if len(parts) == 1 else ("list", tree[1], tuple(parts))


def _is_periodic(tree: Node, name: str) -> bool:
    r"""Whether a formula is a family with a period in \pi or degrees: its variable is an integer by any name."""
    at = [substitute(tree, name, ("num", Fraction(value))) for value in range(3)]
    steps: list[Node] = [("-", at[1], at[0]), ("-", at[2], at[1])]
    if symbols(steps[0]) or not equal(*steps):
        return False
    return has(tree, "deg") or has(tree, "const", "pi")
