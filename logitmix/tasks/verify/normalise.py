r"""Normalises the spelling of answers: removes what changes their look and not their meaning.

>>> normalise(r"$\left(3,\ \dfrac{\pi}2\right)$.")
'(3,\\frac{\\pi}{2})'
"""

from __future__ import annotations

import re

from logitmix.tasks.templates import last_boxed
from logitmix.tasks.verify.units import NOT_UNITS, POWER, unit_of, with_units

GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "ζ": "zeta",
    "η": "eta",
    "θ": "theta",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "ν": "nu",
    "ξ": "xi",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "φ": "phi",
    "χ": "chi",
    "ψ": "psi",
    "ω": "omega",
    "Δ": "Delta",
    "Ω": "Omega",
    "Γ": "Gamma",
    "Θ": "Theta",
    "Λ": "Lambda",
    "Σ": "Sigma",
    "Φ": "Phi",
    "Ψ": "Psi",
}
UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—﹣－", "-"),
        **dict.fromkeys("×·⋅∙•✕∗", "*"),
        **dict.fromkeys("°º˚", "^{\\circ}"),
        **dict.fromkeys("\u00a0\u2009\u202f\u3000\u2002\u2003\u200a", " "),
        **dict.fromkeys("\u200b\ufeff\u2060", ""),
        **dict.fromkeys('“”„"«»', ""),
        **dict.fromkeys("’‘′", "'"),
        **dict.fromkeys("€£¥₹￥", "$"),
        **dict(zip("，；：（）［］｛｝＝＋％＜＞．。／", ",;:()[]{}=+%<>../", strict=True)),
        "÷": "/",
        "π": "\\pi ",
        "∞": "\\infty ",
        "√": "\\sqrt ",
        "≤": "\\le ",
        "⩽": "\\le ",
        "≥": "\\ge ",
        "⩾": "\\ge ",
        "≠": "\\ne ",
        "≈": "\\approx ",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "∅": "\\emptyset ",
        "±": "\\pm ",
        "∓": "\\mp ",
        "ℝ": "\\mathbb{R}",
        "½": "\\frac{1}{2}",
        "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}",
        "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}",
        **{sign: f"_{{{digit}}}" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{letter: f"\\{name} " for letter, name in GREEK.items()},
    }
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
EMPHASIS = re.compile(
    r"\\(?:text)?color\s*\{\w+\}|\\(?:mathbf|boldsymbol|bm|underline)\s*\{(-?[0-9.,]+|\(?[A-J]\)?)\}"
)
SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|quad|qquad|enspace|thinspace|medspace|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|hfill|rm|bf|it|mathstrut|noindent)(?![a-zA-Z])|(?<!\\)~|\s+"
)
SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?")
SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "leqslant": "le",
    "leqq": "le",
    "geq": "ge",
    "geqslant": "ge",
    "geqq": "ge",
    "neq": "ne",
    "lor": "or ",
    "vee": "or ",
    "land": "and ",
    "wedge": "and ",
    "varnothing": "emptyset",
    "empty": "emptyset",
    "infin": "infty",
    "inf": "infty",
    "lbrace": "{",
    "rbrace": "}",
    "degree": "circ",
    "mathbbR": "mathbb{R}",
    "imath": "mathrm{i}",
    "thickapprox": "approx",
    "simeq": "approx",
    "doteq": "approx",
    "varepsilon": "epsilon",
}
SYNONYM = re.compile(r"\\(" + "|".join(SYNONYMS) + r")(?![a-zA-Z])")
SIGNS = {
    "\\lt": "<",
    "\\gt": ">",
    "\\times": "*",
    "\\cdot": "*",
    "\\ast": "*",
    "\\div": "/",
    "\\colon": ":",
    "\\lvert": "|",
    "\\rvert": "|",
    "\\vert": "|",
    "\\langle": "(",
    "\\rangle": ")",
    "\\lbrack": "[",
    "\\rbrack": "]",
    "\\lparen": "(",
    "\\rparen": ")",
    "**": "^",
    "<=": "\\le ",
    ">=": "\\ge ",
    "!=": "\\ne ",
    "==": "=",
    "~=": "\\approx ",
}
SIGN = re.compile("|".join(re.escape(sign) + ("(?![a-zA-Z])" if sign[0] == "\\" else "") for sign in SIGNS))
TEXT = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mathit|mathsf|rm|hbox|operatorname\*?)"
    r"\s*\{([^{}]*)\}"
)

PREFIX = re.compile(
    r"(?:(?:so|thus|hence|therefore|and),?\s+)?(?:the\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|option|choice|result|solution)s?\s*(?:is|are|=|:|(?=\(?[A-J]\b))\s*:?\s*",
    re.IGNORECASE,
)


def normalise(answer: str) -> str:
    r"""Remove what changes the look of an answer and not its meaning: `$`, `\left`, thin spaces, `\dfrac`, `\text`.

    Units become `\unit{cm}` at the end of their text; the words "and" and "or" become `\and` and `\or`.
    """
    text = re.sub("⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: f"^{{{power[0].translate(SUPERSCRIPTS)}}}", answer.strip())
    text = EMPHASIS.sub(lambda found: found[1] or "", _unboxed(text.translate(UNICODE)))
    text = re.sub(r"(?<!\\)\\[\[\]()]|\\?\$|`|^\*\*|\*\*$", "", text.strip())
    text = re.sub(
        r"\\begin\{(?:align|aligned|equation|gather|gathered)\*?\}|\\end\{(?:align|aligned|equation)\*?\}", "", text
    )
    text = re.sub(r",\s*\\!\s*|\{\s*,\s*\}", ",", text).replace("\\!", "").replace("\\_", "_")
    text = SPACES.sub(" ", SIZES.sub("", text))
    text = re.sub(r"\\,", " ", text)
    text = re.sub(r"\\[hv]?phantom\s*(?:\{[^{}]*\}|\S)", "", text)
    text = SYNONYM.sub(lambda name: "\\" + SYNONYMS[name[1]], text)
    text = SIGN.sub(lambda sign: SIGNS[sign[0]], text)
    text = _texts(text)
    text = re.sub(r"\^\s*(?:\{\s*(?:\\circ|o)\s*\}|\\circ(?![a-zA-Z]))", "^{\\\\circ}", text)
    text = PREFIX.sub("", text.strip(), count=1) if PREFIX.match(text.strip()) else text
    text = re.sub(r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = _arguments(text.strip())
    text = re.sub(r"\s*(?:\\%|%|\b(?:percentage points|percentage|percent|pct)\b)", r"\\%", text)
    text = re.sub(r"(?<![\w.}])([0-9]+(?:\.[0-9]+)?)[eE]\+?(-?[0-9]+)(?![\w.])", r"\1*10^{\2}", text)
    text = _trimmed(text)
    text = with_units(text)
    text = _tight(text)
    text = re.sub(r"(?<=[)\]}])U(?=[(\[\\])", r"\\cup", text)
    if re.fullmatch(r"-?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        return text.replace(" ", "")
    text = re.sub(r"(?<![\w)\]}\\])\+(?=\\infty|[0-9.])", "", text)
    if not re.search(r"[(\[]|\\\{", text):
        text = re.sub(
            r"(?<![\w.,}])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", lambda digits: digits[0].replace(",", ""), text
        )
    return text


def _unboxed(text: str) -> str:
    """The content of the boxes; a box beside other numbers is only opened, and earns nothing."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return text
    text = text.replace("\\fbox", "\\boxed")
    boxed = last_boxed(text)
    if boxed is None:
        return text
    around = text[: text.rfind("\\boxed")]
    if not re.search(r"\\boxed", around):
        after = text[text.rfind(boxed) + len(boxed) :]
        # "6, no, \boxed{5}" names two candidates, "2+3=\boxed{5}" only one
        hedged = re.search(r"[0-9]", around + after) and not re.search(r"(?:=|:|\bis)[\s$({]*$", around)
        return f"{around}{boxed}{after}" if hedged else boxed
    # Several boxes are one answer together, so that naming every candidate earns nothing.
    boxes = []
    while "\\boxed" in text:
        box = last_boxed(text)
        boxes.append(box or "")
        text = text[: text.rfind("\\boxed")]
    return ", ".join(dict.fromkeys(reversed(boxes)))


def _texts(text: str) -> str:
    def replace(found: re.Match[str]) -> str:
        words = found[1]
        before = text[: found.start()].rstrip()
        after = text[found.end() :]
        if re.fullmatch(r"\s*,?\s*(?:and|or)\s*", words):
            return f"\\{words.strip(' ,')} "
        power = re.match(POWER, after)
        if (
            re.search(r"[0-9})a-z]$", before)
            and re.match(r"\s*[a-zA-Z]", words)
            and power
            and not after[power.end() :].strip(" .,}])/")
            and not NOT_UNITS.search(words)
            and not re.search(r"[0-9]", words)
            and not re.fullmatch(r"\s*(?:[a-fijkn-rt-z]|xyz?|abc?)\s*", words)  # a variable; m, g, s, l, h are units
        ):
            return unit_of(words, power[0])
        return f" {words} " if len(words.strip()) > 1 else words.strip()

    text = TEXT.sub(replace, text) if "{" in text else text
    text = re.sub(r"(\\unit\{\w*\})" + POWER, r"\1", text)
    return re.sub(r"(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])", r"\\\1 ", text)


def _arguments(text: str) -> str:
    r"""Add braces around arguments that TeX allows without: `\frac12`, `\sqrt3`, `x^2`, `a_1`."""
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\s*(?=[({0-9])", r"\\sqrt", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*([0-9a-zA-Z]|\\[a-zA-Z]+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z]|\\[a-z]+)\s*(?=\{)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z]|\\[a-z]+)", r"\1{\2}", text)
    text = re.sub(r"([\^_])\s*([0-9a-zA-Z](?![0-9.])|\\(?!circ)[a-z]+)", r"\1{\2}", text)
    return re.sub(r"([\^_])\s*(-?[0-9]+(?:\.[0-9]+)?)", r"\1{\2}", text)


def _trimmed(text: str) -> str:
    """Remove closing punctuation, and braces or brackets around a single word or number."""
    text = re.sub(r"^\s*(?::|=|\\approx(?![a-zA-Z]))\s*", "", text).strip()
    while text and text[-1] in ".,;:" and not text.endswith(".."):
        text = text[:-1].rstrip()
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        if text[place - 1 : place] != "\\":
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _tight(text: str) -> str:
    """Keep a blank only between two words or two numbers, or after a comma between numbers."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?<=[0-9]), (?=[0-9])", ",\n", text)
    text = re.sub(r" (?!\w)|(?<!\w) ", "", text)
    return text.replace(",\n", ", ").strip()
