"""Checks of flags that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def validate_at_least(arguments: Any, **limits: int) -> None:
    """Raise `ValueError` for a flag below its limit. A flag that was not given, None, passes."""
    for key, limit in limits.items():
        value = getattr(arguments, key)
        if value is not None and value < limit:
            raise ValueError(f"--{key} is {value}, but must be at least {limit}")


def validate_distinct(sources: Sequence[str], what: str) -> None:
    """Raise `ValueError` if a file or folder is given twice, under whatever path."""
    paths = [Path(source).resolve() for source in sources]
    for i, source in enumerate(sources):
        if paths[i] in paths[:i]:
            raise ValueError(f"the {what} {source} is given twice, and would be compared with itself; give it once")
