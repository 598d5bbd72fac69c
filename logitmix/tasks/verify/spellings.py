r"""The names, signs and words that answers may use. A line of a table is a spelling, and then others of the same."""

from __future__ import annotations


def _table(text: str) -> dict[str, str]:
    return {spelling: line.split()[0] for line in text.splitlines() for spelling in line.split()}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ANGLES = _words("sin cos tan cot sec csc")
INVERSES = {f"{prefix}{name}": f"a{name}" for prefix in ("arc", "a") for name in ANGLES}
INVERSES |= {"tg": "tan", "ctg": "cot", "arctg": "atan", "arcctg": "acot", "cosec": "csc"}
LISTED = _words("max min gcd lcm")
FUNCTIONS = ANGLES | INVERSES.keys() | LISTED | _words("sinh cosh tanh ln exp log lg abs sqrt cbrt det")
GREEK = _words(
    "alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi"
    " varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
)
TEXTS = "text mbox textbf textit textrm textsf texttt textnormal textup mathrm mathit mathsf hbox operatorname"
STYLES = (
    "displaystyle textstyle scriptstyle limits nolimits hfill rm bf it noindent quad qquad enspace thinspace medspace"
)
BOLD = _words(r"\mathbf \boldsymbol \bm \underline")
ACCENTS = _words(r"\overline \bar \vec \hat \tilde \dot \mathcal \overrightarrow \widehat \mathbb \angle \triangle")

SAME = _table(
    r"""
    \frac \dfrac \tfrac \cfrac
    \binom \dbinom \tbinom
    ≤ \le \leq \leqslant \leqq <= ⩽ ≦
    ≥ \ge \geq \geqslant \geqq >= ⩾ ≧
    ≠ \ne \neq != \not=
    ≈ \approx \thickapprox \simeq \doteq ~=
    < \lt
    > \gt
    = ==
    ∈ \in
    ⊆ \subseteq \subset ⊂
    ≡ \equiv
    ± \pm
    ∓ \mp
    * \times \cdot \ast \middot \centerdot
    / \div
    : \colon
    ^ **
    _ \_
    % \% percent pct percentage percents
    ° \degree
    ' \prime
    | \vert \mid ∣
    ( \langle \lparen
    ) \rangle \rparen
    [ \lbrack
    ] \rbrack
    \{ \lbrace
    \} \rbrace
    ∪ \cup
    ∩ \cap
    ∅ \emptyset \varnothing \empty
    ∞ \infty \infin \inf infty infinity Infinity inf oo
    … \ldots \dots \cdots ... ..
    → \to \rightarrow \longrightarrow
    \setminus \backslash ∖
    \and and \And
    \or or
    \land \wedge ∧
    \lor \vee ∨
    \R \Re \Reals \mathbbR
    \pi pi
    \epsilon \varepsilon
    \surd sqrt
    \bmod \mod mod
    \boxed \fbox
    i \imath
    """
)

_LETTERS = "αβγδεζηθκλμνξρστφχψωΔΩΓΘΛΣΦΨπ"
_LETTER_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
    " Delta Omega Gamma Theta Lambda Sigma Phi Psi pi"
)
UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—﹣－", "-"),
        **dict.fromkeys("×·⋅∙•✕∗", "*"),
        **dict.fromkeys("º˚", "°"),
        **dict.fromkeys("\u00a0\u2009\u202f\u3000\u2002\u2003\u200a", " "),
        **dict.fromkeys("\u200b\ufeff\u2060", ""),
        **dict.fromkeys("’‘′", "'"),
        **dict.fromkeys("“”„«»", '"'),
        **dict(zip("，；：（）［］｛｝＝＋％＜＞．。／￥、÷", ",;:()[]{}=+%<>../¥,/", strict=True)),
        **{letter: f"\\{name} " for letter, name in zip(_LETTERS, _LETTER_NAMES.split(), strict=True)},
        **{sign: f"_{{{digit}}}" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{sign: rf"\frac{{{top}}}{{{low}}}" for sign, top, low in ("½12", "⅓13", "⅔23", "¼14", "¾34", "⅕15", "⅛18")},
        "√": "\\surd ",
        "∛": "\\sqrt[3]",
        "∜": "\\sqrt[4]",
        "ℝ": "\\mathbb{R}",
        "ℤ": "\\mathbb{Z}",
        "∠": "\\angle ",
        "△": "\\triangle ",
        "⁺": "^+",
    }
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

# What may come before an answer: words that lead to a noun and "is", and words that say how exact the answer is
CONCLUDING = _words(r"so thus hence therefore \therefore")
LEADING = _words(r"the final correct right best \and")
NOUNS = _words("answer answers option options choice choices result results solution solutions")
ABOUT = _words("approximately about roughly exactly")
