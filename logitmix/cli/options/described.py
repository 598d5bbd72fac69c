"""The fields of the training configurations, read from `described.json` instead of from TRL.

Importing a configuration of TRL takes seconds. A described class has its flags, types and defaults, so that help and
wrong flags need no library for models. `python -m logitmix.cli.options.described` (`make flags`) writes the file.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass
from enum import Enum, StrEnum
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

FILE = Path(__file__).with_name("described.json")
CONFIGURATIONS = {
    "LogitMixGRPOConfig": "logitmix.training.config",
    "ResumableSFTConfig": "logitmix.training.sft",
    "LogitMixDistillationConfig": "logitmix.training.distillation",
}
LIBRARIES = ("torch", "transformers", "trl")  # whose versions decide on fields and defaults
PLAIN_TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict)} | {
    "Any": Any,
    "Literal": Literal,
}


class Described:
    """The values of a configuration's fields, before the configuration itself is imported.

    `library` is the configuration of TRL that it extends, and `own` names the fields that logitmix defines or
    redefines, in its order.
    """

    library = ""  # without annotations, which would make them fields
    own = tuple[str, ...]()

    def configuration(self) -> Any:
        """The configuration with these values. Raises `ValueError` for values that it rejects."""
        name = type(self).__name__
        config = getattr(import_module(CONFIGURATIONS[name]), name)
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {f.name for f in fields(self) if values[f.name] != _default(f)}  # type: ignore[arg-type]
        return config(**{key: _plain(value) for key, value in values.items() if key in changed})


def described(name: str) -> type[Described]:
    """A dataclass with the fields of the configuration. With other versions of TRL it is read from the import."""
    description = _read()["configurations"].get(name) if _read()["versions"] == _versions() else None
    if description is None:
        description = describe(getattr(import_module(CONFIGURATIONS[name]), name))
    names = PLAIN_TYPES | {key: StrEnum(key, {v: v for v in values}) for key, values in description["enums"].items()}
    # The file is part of this package; its types are expressions such as `list[str] | None`
    rows = [(f["name"], eval(f["type"], {}, names), _field(f)) for f in description["fields"]]
    namespace = {"library": description["library"], "own": tuple(description["own"])}
    return make_dataclass(name, rows, bases=(Described,), namespace=namespace, kw_only=True)


def describe(config: type) -> dict[str, Any]:
    """What `described` needs to know of a configuration, as JSON holds it."""
    hints = get_type_hints(config)
    enums: dict[str, list[str]] = {}
    rows: list[dict[str, Any]] = []
    for f in fields(config):
        if f.init:
            row = {"name": f.name, "type": _type_text(hints[f.name], enums)}
            default = _default(f)
            row |= {} if default is MISSING else {"default": _plain(default)}
            choices = {"choices": list(f.metadata["choices"])} if "choices" in f.metadata else {}
            rows.append(row | {"metadata": dict(f.metadata) | choices})
    names = [row["name"] for row in rows]
    ours = [c for c in reversed(config.__mro__) if c.__module__.startswith("logitmix")]
    own = list(dict.fromkeys(name for c in ours for name in inspect.get_annotations(c) if name in names))
    library = next(c.__name__ for c in config.__mro__ if c.__module__.startswith("trl."))
    return {"library": library, "own": own, "enums": enums, "fields": rows}


def describe_all() -> dict[str, Any]:
    """The content of `described.json` for the installed versions."""
    configurations = {name: describe(getattr(import_module(home), name)) for name, home in CONFIGURATIONS.items()}
    return {"versions": _versions(), "configurations": configurations}


@cache
def _read() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def _versions() -> dict[str, str]:
    return {library: version(library).partition("+")[0] for library in LIBRARIES}  # without torch's `+cpu`


def _type_text(hint: Any, enums: dict[str, list[str]]) -> str:
    """The type as an expression of `PLAIN_TYPES` and enumerations, whose values are added to `enums`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return "None"
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    texts = [_type_text(argument, enums) for argument in arguments]
    if origin in (Union, UnionType):
        return " | ".join(texts)
    if origin is list or origin is dict:
        return f"{origin.__name__}[{', '.join(texts)}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        enums[hint.__name__] = [member.value for member in hint]
        return hint.__name__
    name = getattr(hint, "__name__", "")
    return name if PLAIN_TYPES.get(name) is hint else "Any"


def _field(description: Mapping[str, Any]) -> Any:
    default, metadata = description.get("default", MISSING), description["metadata"]
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _plain(value: Any) -> Any:
    """The value with members of an enumeration replaced by their texts, from which the configuration makes its own."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value.value if isinstance(value, Enum) else value


if __name__ == "__main__":
    FILE.write_text(json.dumps(describe_all(), indent=1, ensure_ascii=False) + "\n")
