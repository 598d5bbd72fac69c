"""Checks of what the patches files assume of a library. A failure names the library and its installed version."""

import inspect
from importlib.metadata import version
from typing import Any


def assert_has(package: str, owner: Any, *names: str) -> None:
    """`owner`, a module, class or object of `package`, has each of the names."""
    missing = [name for name in names if not hasattr(owner, name)]
    owner_name = getattr(owner, "__qualname__", getattr(owner, "__name__", repr(owner)))
    assert not missing, f"{package} {version(package)}: {owner_name} no longer has {', '.join(missing)}"


def assert_parameters(package: str, function: Any, *names: str) -> None:
    """`function` of `package` takes parameters of these names, in this order, at its start."""
    found = tuple(inspect.signature(function).parameters)
    assert found[: len(names)] == names, (
        f"{package} {version(package)}: {function.__qualname__} takes {found}, and no longer begins with {names}"
    )


def assert_source_has(package: str, function: Any, *fragments: str) -> None:
    """The source of `function` holds each fragment: for what it reads or calls, which no signature shows."""
    source = inspect.getsource(function)
    missing = [fragment for fragment in fragments if fragment not in source]
    assert not missing, f"{package} {version(package)}: {function.__qualname__} no longer contains {missing}"
