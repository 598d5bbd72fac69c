r"""Units at the end of an answer, normalised to `\unit{cm}`; also "5 million"."""

from __future__ import annotations

import re

# A unit may be left out; two known units that differ make two answers.
UNITS = {
    spelling: names.split()[0]
    for names in (
        "degree degrees deg",
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "mph",
        "kmph",
        "s sec secs second seconds",
        "min mins minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "yr year years",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs pound pounds",
        "oz ounce ounces",
        "ml mL milliliter milliliters",
        "l L liter liters litre litres",
        "dollar dollars usd USD bucks",
        "cent cents",
        "radian radians rad",
        "unit units",
    )
    for spelling in names.split()
}
_WORD = "|".join(
    sorted((unit for unit in UNITS if len(unit) > 1 and unit not in ("in", "min")), key=len, reverse=True)
)
POWER = r"(?:\s*\^\s*(?:\{\s*[0-9]\s*\}|[0-9]))?"
BARE_UNIT = re.compile(
    rf"(?:(?<=[0-9}})])|(?<=\\pi)|(?<=[a-z])(?=\s))\s*(?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
    rf"({_WORD}|(?<=[0-9}})]\s)(?:m|g|s|h|L|min|in)(?=\s*(?:\^|/|per\b|$))|(?<=[0-9])m(?=\s*\^\s*\{{?[23]))\.?{POWER}"
    rf"(?:\s*(?:/|per)\s*(?:{_WORD}|[a-zA-Z]+){POWER})?\s*$"
)
NOUNS = re.compile(r"(?<=[0-9}])\s+[a-z]{3,}(?:\s+[a-zA-Z]+)*$")
# Words after a number that change its value; they are neither units nor things counted.
NOT_UNITS = re.compile(
    r"^\s*(?:squared|cubed|half)\b|\b(?:and|or|to|mod|plus|minus|over|than|if|base|point|factorial|choose|halves|thirds"
    r"|fifths|tenths|hundredths|thousandths|dozen|hundred|thousand|million|billion|trillion|lakh|crore"
    r"|either|neither|maybe|perhaps|versus|vs|through|not|zero|one|two|three|four|five|six|seven|eight|nine|ten)\b"
)
NOT_NOUNS = re.compile(rf"{NOT_UNITS.pattern}|\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|abs|pi)\b")
WORD_NUMBERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def unit_of(words: str, power: str) -> str:
    r"""`\unit{cm2}` for "square centimeters" or "cm^2"; `\unit{}` for an unknown unit, `\unit{km}` for km/h."""
    name = re.search(r"(?:square|sq|cubic|cu)\b\.?\s*(\w+)|(\w+)", words)
    digit = re.search(r"\^[\s{]*([0-9])", power)
    exponent = "2" if re.match(r"\s*sq", words) else "3" if re.match(r"\s*cu", words) else digit[1] if digit else ""
    known = UNITS.get((name[1] or name[2]) if name else "", "")
    if re.search(r"(?:/|\bper)\s*h", words) and known in ("mi", "km"):
        known = {"mi": "mph", "km": "kmph"}[known]
    return f"\\unit{{{known}{exponent}}}"


def with_units(text: str) -> str:
    r"""The text with its unit as `\unit{...}` at the end, and "million" and the like as powers of ten."""
    if re.search(r"\\?(?:sin|cos|tan|cot|csc|sec(?!\.?$))(?![a-z])", text):
        return text  # the degrees are inside a function: they count
    if text.endswith("^{\\circ}") and len(text) > 8:
        return text.removesuffix("^{\\circ}") + "\\unit{degree}"
    text = re.sub(r"\^\{\\circ\}\s*(?:\\unit\{\w*\}|[CF]\b)$", r"\\unit{degree}", text)
    if not text[:1].isalpha() and (unit := BARE_UNIT.search(text)):
        text = text[: unit.start()] + unit_of(unit[0], unit[0])
    elif (noun := NOUNS.search(text)) and not NOT_NOUNS.search(noun[0]):
        text = text[: noun.start()] + "\\unit{}"
    for word, power in WORD_NUMBERS.items():
        text = re.sub(rf"(?<=[0-9}}])\s*{word}s?\b", f"*10^{{{power}}}", text)
    return text
