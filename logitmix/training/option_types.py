"""The values of options by the types of their fields: a text is one string, and a whole number has no fraction.

Flags are converted by the parser. Values of a YAML file and of a script arrive as they are: `"</answer>"` for a list
of texts, which Python would read as a list of characters, and 1.5 for a whole number.
"""

import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from numpy import bool_

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def typed(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of fields of the dataclass `options`; a list-valued field that is given one element becomes a list.

    None is left to the dataclass. Raises `ValueError` for a fraction or a boolean where a whole number belongs, a text
    where a number or a boolean belongs, elements of a list that are of another type, and what is none of a field's
    choices.
    """
    hints = _hints(options)
    return {name: _typed(name, value, hints[name]) if name in hints else value for name, value in values.items()}


def set_types(options: Any) -> None:
    """Give the fields of a dataclass instance the values of `typed`. Raises `ValueError` as `typed`."""
    names = [field.name for field in fields(options)]
    for name, value in typed(type(options), {name: getattr(options, name) for name in names}).items():
        setattr(options, name, value)


@cache
def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def _typed(name: str, value: Any, hint: Any) -> Any:
    alternatives = [kind for kind in _alternatives(hint) if kind is not type(None)]
    if value is None or len(alternatives) != 1:
        return value  # of several types, such as a name or a dictionary, the library tells them apart
    (kind,) = alternatives
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{name} is {value!r}; it must be {'one of ' if len(choices) > 1 else ''}{names}")
        return value
    if kind is list or get_origin(kind) is list:
        return _typed_list(name, value, *(get_args(kind) or (Any,)))
    if kind is not str and not _is_of(value, kind):  # a number is as good as its text, for the name of a run
        raise ValueError(f"{name} is {value!r}, but must be {_NAMES[kind]}{_way_out(value, kind)}")
    return value


def _typed_list(name: str, value: Any, kind: Any) -> list[Any]:
    elements = list(value) if isinstance(value, (list, tuple)) else [value]
    for element in elements:
        if not _is_of(element, kind):
            raise ValueError(
                f"{name} holds {element!r}, but each of its elements must be {_NAMES[kind]}{_way_out(element, kind)}"
            )
    return elements


def _is_of(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind is bool:  # 0 and 1 are used as booleans
        return isinstance(value, (bool, bool_)) or (isinstance(value, Integral) and value in (0, 1))
    return kind is not str or isinstance(value, str)


def _way_out(value: Any, kind: Any) -> str:
    if kind is str:
        return f"; write it in quotes, as {str(value)!r}"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return "; write it without quotes" if isinstance(value, str) else ""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
