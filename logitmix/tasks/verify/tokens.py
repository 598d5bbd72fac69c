r"""Splits a formula in LaTeX into tokens, and knows the names that it may use."""

import re

TRIGONOMETRIC = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan"}
)
NAMES = TRIGONOMETRIC | {"sinh", "cosh", "tanh", "ln", "exp", "log", "lg", "abs", "sqrt", "max", "min"}
ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "lg": "log"}
INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
GREEK = re.compile(
    "(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi"
    "|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell|hbar)"
)
ACCENTS = re.compile("overline|bar|vec|hat|tilde|dot|mathbf|boldsymbol|mathcal|mathbb|overrightarrow|widehat")
TOKEN = re.compile(
    r"\\[a-zA-Z]+|\\.|[0-9]*\.[0-9]*\\overline\{[0-9]+\}|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\s+|[a-zA-Z]'*|.",
    re.DOTALL,
)
WORD = re.compile("|".join(sorted([*NAMES, "pi", "infty"], key=len, reverse=True)))
COMMANDS = NAMES | {"frac", "pi", "binom", "lfloor", "lceil"}


class Unreadable(Exception):
    """This module cannot parse the text, which may still be a formula."""


def tokenize(text: str) -> list[str]:
    """The tokens of a normalised formula. Raises `Unreadable` for words.

    A blank is a token only between digits, where it separates two numbers or makes a mixed number.
    """
    tokens: list[str] = []
    for token in TOKEN.findall(re.sub(r"(?<![a-zA-Z\\])[a-zA-Z]{2,}", _split_names, text)):
        if not token.isspace():
            tokens.append(token)
        elif tokens and tokens[-1][-1].isdigit():
            tokens.append(" ")
    return tokens


def starts_factor(name: str) -> bool:
    """Whether a command of this name starts a factor of a product."""
    return name in COMMANDS or bool(GREEK.fullmatch(name) or ACCENTS.fullmatch(name))


def _split_names(word: re.Match[str]) -> str:
    r"""`sinx` is `\sin x` and `xy` is x times y, but a longer run of letters is a word, not a product."""
    letters = re.sub(WORD, lambda name: f"\\{name[0]} ", word[0])
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{5,}", letters):
        raise Unreadable(f"{word[0]!r} is a word")
    return letters
