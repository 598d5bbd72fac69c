"""The error for a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str | None = None) -> ValueError:
    """The error for an unknown `name`: it suggests the nearest of `known` and ends in `hint`.

    Without a hint it lists `known`. Use it as `raise unknown_name("task", name, TASKS)`.
    """
    known = list(known)
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ValueError(f"there is no {kind} {name!r}; did you mean {nearest!r}? {hint or _listing(kind, known)}")


def _listing(kind: str, known: list[str]) -> str:
    return f"The {kind}s are {', '.join(known)}"
