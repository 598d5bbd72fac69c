"""Values in a row of data, and how they become the texts of a problem.

Known shapes are opened, and everything else is refused: `str` of a list, a dict or NaN would silently give a text that
no model can answer. docs/tasks.md has the table.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

GROUND_TRUTH = "ground_truth"  # of verl's `reward_model`
ROLES = ("system", "user", "assistant")

Message: TypeAlias = tuple[str, str]  # role and content: hashable, as problems are

# What `str` writes for a value that is no text. Lists of bare numbers are not included: `[1, 2]` is an interval.
_REPR = re.compile(
    r"nan|None|<[\w.]+ object at 0x[0-9a-f]+>|(?:np\.\w+|array|Decimal|Fraction|datetime\.\w+)\(.*\)", re.DOTALL
)


def open_text(value: Any, name: str = "value") -> str:
    """The text of a cell: a text, a number, or a list or dict that holds just one.

    `[x]` and `{"ground_truth": x}` are opened to x, and `[{"type": "text", "text": x}]` too. A missing value is "".
    `name` is what the cell is called in an error.

    Raises `ValueError` for any other type, NaN and infinity, and text that no file or tokenizer can encode.
    """
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, str):
        return _encodable(str(value), name)
    if isinstance(value, Real | Decimal) and not isinstance(value, bool):
        if isinstance(value, float | Decimal) and not math.isfinite(value):
            raise ValueError(f"the {name} is {value}, which is no answer or text; correct the row, or leave it out")
        return str(value)
    if _are_parts(value):
        return "".join(open_text(part["text"], name) for part in value)
    if isinstance(value, list) and len(value) == 1:
        return open_text(value[0], name)
    if isinstance(value, Mapping) and GROUND_TRUTH in value:
        return open_text(value[GROUND_TRUTH], name)
    raise ValueError(f"the {name} is {_describe(value)}; write it as one text")


def open_question(value: Any) -> tuple[str, tuple[Message, ...]]:
    """The question in a cell, and the messages before it if the cell holds a chat, whose last message asks.

    Raises `ValueError` as `open_text`, and for a chat that does not end in the user's message.
    """
    value = _plain(value)
    if _is_message(value):
        value = [value]
    if not (isinstance(value, list) and value and all(map(_is_message, value))):
        return open_text(value, "question"), ()
    messages = tuple((_open_role(message), open_text(message["content"], "question")) for message in value)
    if messages[-1][0] != "user":
        raise ValueError(
            f"the question is a chat whose last message is of the role {messages[-1][0]!r}, but must be the user's; "
            "leave out what comes after the question"
        )
    return messages[-1][1], messages[:-1]


def open_list(value: Any, name: str) -> list[Any]:
    """The values of a cell that holds several. Raises `ValueError` for any other type."""
    value = _plain(value)
    if not isinstance(value, list | type(None)):
        raise ValueError(f"the {name} is {_describe(value)}; write a list")
    return value or []


def written_by_program(text: str) -> str | None:
    """The kind of value that Python or JSON would write as this text (`"['5']"`, `"nan"`), None if it is a text.

    It reads the finished text, independently of `open_text`.
    """
    text = text.strip()
    if _REPR.fullmatch(text):
        return "a missing value" if text in ("nan", "None") else "an object"
    if not text.startswith(("[", "{", "(", "b'", 'b"')):
        return None
    value = _parse(text)
    return None if _is_only_numbers(value) else _describe(value)


def _parse(text: str) -> Any:
    """The value that Python or JSON reads from the text, 0 if there is none."""
    for read in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of a formula that looks like a call
                return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return 0


def _is_only_numbers(value: Any) -> bool:
    """Whether mathematics writes the value as Python does: numbers, intervals, sets, matrices."""
    if isinstance(value, list | tuple | set):
        return all(map(_is_only_numbers, value))
    return value == {} or (isinstance(value, Real | complex) and not isinstance(value, bool))


def _plain(value: Any) -> Any:
    """The value with numpy's arrays and its scalars as Python's: pandas and `datasets` return them."""
    if type(value).__module__ == "numpy" and not isinstance(value, Real | str | bytes):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} has a lone surrogate, {text[error.start]!r}, at character {error.start}, which is half of a "
            "character and cannot be encoded; correct the row, or leave it out"
        ) from error
    return text


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _are_parts(value: Any) -> bool:
    """Whether the value is the content of a message in parts, all of them text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and part.get("type") == "text" and "text" in part for part in value)
    )


def _open_role(message: Mapping[str, Any]) -> str:
    others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if message["role"] not in ROLES or others:
        what = f"a field {others[0]!r}" if others else f"the role {message['role']!r}"
        raise ValueError(
            f"the question is a chat with a message of {what}; write messages with a role ({', '.join(ROLES)}) and a "
            "content"
        )
    return str(message["role"])


def _describe(value: Any) -> str:
    """A type, with what tells it from others, and the start of the value."""
    kind = type(value).__name__
    shape = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if isinstance(value, Mapping):
        shape += f" with the keys {', '.join(map(repr, value)) or '(none)'}"
    elif isinstance(value, list | tuple | set):
        shape += f" of {len(value)} values ({', '.join(sorted({type(item).__name__ for item in value}))})"
    return f"{shape}, {' '.join(repr(value)[:60].split())}"
