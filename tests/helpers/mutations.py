"""Wrong answers, generated from right ones."""

import re


def mutations(gold: str, other: str) -> dict[str, str]:
    """Wrong answers similar to `gold`, by the kind of mutation; `other` is the gold of another question."""
    found = {"another gold": other, "another number": "31337" if gold != "31337" else "31338"}
    numbers = list(re.finditer(r"[0-9]+", gold))
    if numbers:
        for place, match in (("first", numbers[0]), ("last", numbers[-1])):
            found[f"{place} number plus one"] = f"{gold[: match.start()]}{int(match[0]) + 1}{gold[match.end() :]}"
        last = numbers[-1]
        digit = str((int(last[0][-1]) + 5) % 10)
        found["last digit"] = f"{gold[: last.start()]}{last[0][:-1]}{digit}{gold[last.end() :]}"
    bare = gold.strip().removeprefix("$")
    found["sign"] = bare[1:] if bare.startswith("-") else f"-{bare}"
    if "+" in gold or re.search(r"[0-9a-z})] ?- ?", gold):
        found["inner sign"] = re.sub(r"(?<=[0-9a-z})])( ?)([+-])", lambda m: m[1] + "+-"[m[2] == "+"], gold, count=1)
    for left, right in (("[", "("), ("(", "[")):
        if re.match(rf"\s*(?:.{{0,9}}\\in)?\s*(?:\\left)?\s*\{left}.*,", gold):
            found[f"{left} to {right}"] = gold.replace(left, right, 1)
    for left, right in (("]", ")"), (")", "]")):
        if re.search(rf",.*\{left}\s*\$?\s*$", gold):
            found[f"{left} to {right}"] = right.join(gold.rsplit(left, 1))
    found["swapped"] = re.sub(r"\\([dt]?frac)\{([^{}]*)\}\{([^{}]*)\}", r"\\\1{\3}{\2}", gold, count=1)
    choice = re.fullmatch(r"(\\text\{)?\(?([A-J])\)?(\})?", gold)
    if choice:
        found["neighbouring choice"] = gold.replace(choice[2], chr(ord(choice[2]) + 1))
        found["neighbouring bare choice"] = chr(ord(choice[2]) - 1) if choice[2] > "A" else "B"
        found.pop("sign")
    return {name: wrong for name, wrong in found.items() if wrong.strip() != gold.strip()}
