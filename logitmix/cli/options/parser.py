"""Command-line flags, YAML files and recipes as configuration objects, through TRL's argument parser.

The options of a command are a dataclass: its fields are flags, or are dataclasses (groups) whose fields are flags.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

import yaml
from trl import TrlParser

from logitmix.cli.options.described import Described
from logitmix.cli.options.help import asks_for_help, print_help
from logitmix.cli.options.recipe import RecipeArguments, launched_processes
from logitmix.paper.recipes import Recipe, configure, load_recipe, resolve_policy
from logitmix.training.option_types import typed

Options = TypeVar("Options")


class Validated:
    """A base class of options that are checked before what they configure is imported."""

    def validate(self) -> None:
        """Raise `ValueError` for options that contradict each other."""


def parse(
    verb: str,
    description: str,
    options: type[Options],
    argv: Sequence[str],
    positional: tuple[str, str] | None = None,
) -> Options:
    """The options of `logitmix VERB`: flags override `--config file.yaml`, which overrides `--recipe NAME`.

    `positional` names a field whose values may come first, without its flag, and how the usage line shows them.
    `--recipe` needs a field of type `RecipeArguments`. With `--help` this prints the help and exits with status 0.

    Raises `ValueError` for an unknown key or flag, with the nearest known one, and for a value of the wrong type.
    """
    groups = _groups(options)
    if asks_for_help(argv):
        print_help(verb, description, groups, positional, everything="all" in argv)
        raise SystemExit(0)
    argv = list(argv)
    if positional is not None and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{positional[0]}")
    parser = _Parser(groups, prog=f"logitmix {verb}", add_help=False, allow_abbrev=False)
    if RecipeArguments in groups:
        _apply_recipe(parser, argv, verb)
    try:
        *parsed, from_config, from_flags = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"there is no config file {error.filename!r}") from error
    except IndexError as error:
        raise ValueError("--config needs the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the config file is not YAML: {' '.join(str(error).split())}") from error
    keys = [field.name for group in groups for field in fields(group) if field.init]
    for source, strings in (("in the config file", from_config), ("on the command line", from_flags)):
        _validate_nothing_remains(strings, source, keys, verb)
    flags = [_key(string, keys) for string in argv if string.startswith("--")]
    return _assemble(options, parsed, _sources(parser.recipe, parser.config_keys, flags))


def build(options: type[Options], recipe_name: str | None, settings: Mapping[str, Any]) -> Options:
    """The options that `parse` makes of the recipe and these settings as flags, without a command line.

    Raises `ValueError` for an unknown recipe. A setting that is not a flag fails an assertion.
    """
    groups = _groups(options)
    recipe = None if recipe_name is None else load_recipe(recipe_name).divided_among(launched_processes())
    unknown = settings.keys() - {field.name for group in groups for field in fields(group)}
    assert not unknown, f"{options.__name__} has no {', '.join(sorted(unknown))}"
    if recipe is None:
        values = resolve_policy(settings)
    else:
        settings = {"recipe": recipe.name, **settings}
        values = recipe.settings(settings)
    return _assemble(options, [configure(group, values) for group in groups], _sources(recipe, (), settings))


def flatten(*groups: Any) -> dict[str, Any]:
    """The values of several dataclasses by flag, as `run.jsonl` records them; a later one wins."""
    return {key: value for group in groups for key, value in vars(group).items()}


class _Parser(TrlParser):
    """TRL's parser, with a recipe under the config file, and errors instead of exits."""

    recipe: Recipe | None = None
    config_keys: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def set_recipe_defaults(self, recipe: Recipe) -> None:
        self.recipe = recipe
        unknown = super().set_defaults_with_config(**{key: value.value for key, value in recipe.values.items()})
        assert not unknown, f"the recipe {recipe.name} has keys that are not flags: {unknown}"

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self.config_keys = tuple(config)
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        if self.recipe is not None:
            vars(namespace).update(resolve_policy(vars(namespace)))
        for group in self.dataclass_types:
            names = {field.name for field in fields(group)}
            values = {key: value for key, value in vars(namespace).items() if key in names}
            vars(namespace).update(typed(group, values))
        return namespace, rest


def _groups(options: type) -> list[type]:
    """The dataclasses whose fields are flags: the types of the fields of `options`, or `options` itself."""
    types = list(get_type_hints(options).values())
    return types if all(map(is_dataclass, types)) else [options]


def _assemble(options: type[Options], parsed: Sequence[Any], sources: dict[str, str]) -> Options:
    for group in parsed:
        if isinstance(group, RecipeArguments):
            group.sources = sources
    if _groups(options) == [options]:
        (single,) = parsed
        return cast(Options, single)
    assembled = cast(Callable[..., Options], options)(*parsed)
    if isinstance(assembled, Validated):
        assembled.validate()
    for name, group in list(vars(assembled).items()):
        if isinstance(group, Described):
            setattr(assembled, name, group.configuration())
    return assembled


def _apply_recipe(parser: _Parser, argv: Sequence[str], verb: str) -> None:
    """Make the values of the recipe given by `--recipe` the defaults, its batches divided among the processes."""
    given, _ = _Parser([RecipeArguments], add_help=False, allow_abbrev=False).parse_known_args(list(argv))
    if given.recipe is not None:
        recipe = load_recipe(given.recipe)
        if recipe.verb != verb:
            raise ValueError(f"{recipe.name} is a recipe for `logitmix {recipe.verb}`, not for `logitmix {verb}`")
        parser.set_recipe_defaults(recipe.divided_among(given.num_processes or launched_processes()))
    if given.dry_run:
        import torch

        if not torch.accelerator.is_available():
            parser.set_defaults(use_cpu=True)  # transformers rejects bf16 without a GPU, even for a plan


def _validate_nothing_remains(strings: Sequence[str], source: str, keys: Sequence[str], verb: str) -> None:
    for string in strings:
        if string.startswith("--"):
            key = _key(string, keys)
            nearest = get_close_matches(key, keys, n=1)
            way_out = f"did you mean {nearest[0]!r}?" if nearest else f"`logitmix {verb} --help` lists the flags"
            raise ValueError(f"unknown key {key!r} {source}; {way_out}")
    if strings:
        raise ValueError(f"{strings[0]!r} {source} does not belong to any flag")


def _key(flag: str, keys: Collection[str]) -> str:
    """The key of a flag: `learning_rate` for `--learning-rate=1e-5`, and `bf16` for `--no_bf16`."""
    key = flag.removeprefix("--").split("=")[0].replace("-", "_")
    return key.removeprefix("no_") if key not in keys and key.removeprefix("no_") in keys else key


def _sources(recipe: Recipe | None, config_keys: Collection[str], flags: Collection[str]) -> dict[str, str]:
    """The source of each value that is not a default, by key."""
    values = {} if recipe is None else {key: str(value) for key, value in recipe.values.items()}
    return values | dict.fromkeys(config_keys, "config file") | dict.fromkeys(flags, "flag")
