r"""Units and counted things after a number: `5\text{ cm}^2`, `10 m/s`, `25 apples`.

A unit may be left out, and so may its power; two units must agree. `$`, `%` and degrees are units like any other.

>>> same_unit("cm", ""), same_unit("cm", "m"), same_unit("cm2", "cm"), same_unit("%", "$")
(True, False, True, False)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from logitmix.tasks.verify.spellings import FUNCTIONS
from logitmix.tasks.verify.tokens import Token

UNITS = {
    spelling: names.split()[0]
    for names in (
        "° degree degrees deg",
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "dm decimeter decimeters decimetre decimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "mi/h mph",
        "km/h kmph kph",
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
        "$ dollar dollars usd USD bucks",
        "€ euro euros",
        "cent cents",
        "radian radians rad",
        "am AM",
        "pm PM",
        "°C C",
        "°F F",
        "th st nd rd",
    )
    for spelling in names.split()
}
MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PLAIN_LETTERS = frozenset("mgshL")  # units without \text, after a blank
_PHRASE = re.compile(
    r"(?:(?P<shape>square|sq|cubic|cu) (?:\. )?)?(?P<name>[a-zA-Z]+)(?: \.)?"
    r"(?: (?:\^ (?:\{ )?(?P<power>[0-9])(?: \})?|(?P<word>squared|cubed)))?"
    r"(?P<per> (?:/|per|an?) (?P<under>[a-zA-Z]+)(?: \.)?(?: \^ (?:\{ )?(?P<below>[0-9])(?: \})?)?)?"
)
_NOUNS = re.compile(r"[a-zA-Z]{3,}(?: [-a-zA-Z]+)*(?: \.)?")
# Words after a number that change its value; they are neither units nor things counted.
NOT_NOUNS = re.compile(
    r"^(?:squared|cubed|half)\b|\b(?:and|or|to|mod|plus|minus|over|than|if|base|point|factorial|choose|halves|thirds|not"
    r"|quarters|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths|dozen|hundred|thousand|million"
    r"|billion|trillion|lakh|crore|either|neither|maybe|perhaps|versus|vs|through|but|except|unless|when|where|for|zero|one"
    r"|two|three|four|five|six|seven|eight|nine|ten|log|exp|sqrt|abs|pi|sin|cos|tan|cot|csc|wrong|no|mult\w*|div\w*|times"
    r" \w+|less|more|fewer|greater|answer|approximately|about|roughly)\b"
)


def unit_of(tokens: Sequence[Token]) -> str | None:
    """The unit that tokens name, in its shortest spelling; `?apples` for a counted thing; None if they name none."""
    first, gap = tokens[0]
    if not first[0].isalpha() and first[0] != '"':
        return None
    phrase = " ".join(token.text.strip('"') for token in tokens)
    if len(first) == 1 and first.isalpha():
        after = tokens[1].text if len(tokens) > 1 else ""
        if not (
            first in _PLAIN_LETTERS
            and ((gap and after in ("", "^", "/", "per", '"per')) or (after == "^" and first == "m"))
        ):
            return None
    match = _PHRASE.fullmatch(phrase)
    if match and (match["name"] in UNITS or match["name"] in ("unit", "units", "deg")):
        name = UNITS.get(match["name"], "")
        shape = {"sq": "2", "cu": "3"}.get((match["shape"] or match["word"] or "")[:2].replace("cub", "cu"), "")
        if match["word"]:
            shape = "2" if match["word"] == "squared" else "3"
        under = f"/{UNITS.get(match['under'], match['under'])}{match['below'] or ''}" if match["per"] else ""
        return f"{name}{under}{match['power'] or shape}"
    if first[0] == '"' and len(first) == 2 and len(tokens) == 1:
        return f"?{first[1]}"  # \text{ N}
    words = all(len(text) > 1 and text not in FUNCTIONS and (text[0] == '"' or gap) for text, gap in tokens)
    if words and _NOUNS.fullmatch(phrase) and not NOT_NOUNS.search(phrase):
        return "?" + re.sub(r"\W", "", phrase).casefold().rstrip("s")
    return None


def same_unit(left: str, right: str) -> bool:
    """Whether two units agree; a unit, or a power, that one of them leaves out is not compared."""
    if "/" in left + right:
        return left == right or not left or not right
    (name, power), (other, other_power) = (re.findall(r"^(.*?)([0-9]?)$", unit)[0] for unit in (left, right))
    return (not name or not other or name == other) and (not power or not other_power or power == other_power)
