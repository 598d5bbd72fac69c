"""`logitmix verify PREDICTION GOLD`: whether two answers are equal, how each was read, and which rules decided."""

from collections.abc import Sequence

from logitmix.tasks.verify.explain import explain

USAGE = """usage: logitmix verify PREDICTION GOLD [--verifier strict|lenient]

Show how the verifier reads two answers, which rules it applies, and its verdict. The status is 0 for equal
answers and 1 for different ones. Quote the answers: logitmix verify '\\frac{2}{4}' '0.5'

  --verifier  strict (default) as for the reward; lenient also accepts radians for degrees, a ratio for a
              fraction, a decimal rounded to three digits, and tuples in any order
"""


def main(argv: Sequence[str]) -> int:
    """Print the explanation; an answer may begin with a minus. Raises `ValueError` unless two answers are given."""
    answers, verifier, flags = [], "strict", iter(argv)
    for flag in flags:
        if flag in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if flag == "--verifier" or flag.startswith("--verifier="):
            verifier = flag.partition("=")[2] or next(flags, "")
        else:
            answers.append(flag)
    if verifier not in ("strict", "lenient"):
        raise ValueError(f"--verifier is {verifier!r}, but must be strict or lenient")
    if len(answers) != 2:
        raise ValueError(f"verify compares two answers, a prediction and a gold, and got {len(answers)}; quote each")
    text = explain(answers[0], answers[1], lenient=verifier == "lenient")
    print(text)
    return 0 if text.splitlines()[-1].startswith("verdict: equal") else 1
