"""Flags, YAML files and recipes as configuration objects, by TRL's parser and conventions.

`parse` reads a command line. `build` makes the same objects from values, for commands that run other commands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

from logitmix.cli.options.recipe import RecipeArguments, launched_processes
from logitmix.paper.recipes import Recipe, load_recipe

# What `--help` shows of TRL's and transformers' flags; `--help all` shows them all
COMMON_FLAGS = (
    *("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "num_generations", "max_completion_length", "max_length", "temperature", "beta", "bf16"),
    *("gradient_checkpointing", "use_vllm", "logging_steps", "save_steps", "resume_from_checkpoint", "report_to"),
    "seed",
)
POLICY_PATH = "{model_name_or_path}"  # in a recipe: the value of that flag


class RecipeParser(TrlParser):
    """TRL's parser over a recipe: a config file overrides the recipe, and flags override both.

    A mistake raises `ValueError`, where argparse would print a usage and exit.
    """

    recipe: Recipe | None = None
    config_keys: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def set_recipe(self, recipe: Recipe) -> None:
        """Make the recipe's values the defaults."""
        self.recipe = recipe
        unknown = super().set_defaults_with_config(**{key: v.value for key, v in recipe.values.items()})
        assert not unknown, f"the recipe {recipe.name} has keys that are no flags: {unknown}"

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self.config_keys = tuple(config)
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        for key in self.recipe.values if self.recipe else ():
            if getattr(namespace, key) == POLICY_PATH:
                setattr(namespace, key, namespace.model_name_or_path)
        return namespace, rest

    def sources(self, argv: Sequence[str], names: Sequence[str]) -> dict[str, str]:
        """The source of each value that is not a default, by key; `names` are the keys of all flags."""
        keys = [string.split("=")[0][2:].replace("-", "_") for string in argv if string.startswith("--")]
        keys = [key if key in names else key.removeprefix("no_") for key in keys]
        recipe = {key: str(value) for key, value in self.recipe.values.items()} if self.recipe else {}
        return recipe | dict.fromkeys(self.config_keys, "config file") | {k: "flag" for k in keys if k in names}


def parse(program: str, description: str, dataclasses: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses: flags override `--config file.yaml`, which overrides `--recipe name`.

    `program` ends in the command's verb. A recipe can be given where the dataclasses include `RecipeArguments`.
    `--help` prints the flags and exits.

    Raises `ValueError` for an unknown key or flag, naming the nearest valid one, and for a value that does not parse.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(program, description, dataclasses, everything=argv[-1] == "all"), end="")
        raise SystemExit(0)
    parser = RecipeParser(list(dataclasses), prog=program, add_help=False, allow_abbrev=False)
    if RecipeArguments in dataclasses:
        _set_defaults(parser, argv, program.split()[-1])
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
    names = [f.name for dataclass_type in dataclasses for f in fields(dataclass_type) if f.init]
    _validate_all_read(from_config, "in the config file", names, program)
    _validate_all_read(from_flags, "on the command line", names, program)
    for instance in parsed:
        if isinstance(instance, RecipeArguments):
            instance.sources = parser.sources(argv, names)
    return tuple(parsed)


def build(dataclasses: Sequence[type], recipe: str | None, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Instances of the dataclasses from `values`, which override those of a recipe; keys are the flags' names.

    The same objects that `parse` makes of the flags. Raises `ValueError` for a key that is no flag.
    """
    settings: dict[str, Any] = {} if recipe is None else {"recipe": recipe}
    if recipe is not None:
        shared = load_recipe(recipe).shared_by(launched_processes())
        settings |= {key: value.value for key, value in shared.values.items()}
    settings |= {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    settings = {key: settings["model_name_or_path"] if v == POLICY_PATH else v for key, v in settings.items()}
    names = [{f.name for f in fields(dataclass_type) if f.init} for dataclass_type in dataclasses]
    unknown = settings.keys() - set().union(*names)
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    return tuple(
        dataclass_type(**{key: value for key, value in settings.items() if key in own})
        for dataclass_type, own in zip(dataclasses, names, strict=True)
    )


def help_text(program: str, description: str, dataclasses: Sequence[type], everything: bool = False) -> str:
    """The help of a command: its own flags and the common ones of TRL's, or with `everything` all of them."""
    shown = [group if everything else _with_common_flags(group) for group in dataclasses]
    note = "Flags can also be set in a YAML file: --config recipe.yaml."
    if list(shown) != list(dataclasses):
        trl = next(group for group in dataclasses if issubclass(group, TrainingArguments)).__mro__
        config = next(base for base in trl if base.__module__.startswith("trl.")).__name__
        note += f" All flags of TRL's {config} work too: `{program} --help all` lists them."
    parser = HfArgumentParser(
        shown, prog=program, usage=f"{program} [flags]", description=f"{description} {note}", add_help=False
    )
    parser.add_argument("-h", "--help", metavar="[all]", help="Show this help, or that of all flags, and exit.")
    return parser.format_help()


def _with_common_flags(group: type) -> type:
    """A trainer's configuration reduced to our own fields and `COMMON_FLAGS`; any other group as it is."""
    if not issubclass(group, TrainingArguments):
        return group
    types = get_type_hints(group)
    own = vars(group).get("__annotations__", {}) if group.__module__.startswith("logitmix") else {}
    kept = [f for f in fields(group) if f.init and (f.name in own or f.name in COMMON_FLAGS)]
    return make_dataclass(
        group.__name__,
        [
            (f.name, types[f.name], field(default=f.default, default_factory=f.default_factory, metadata=f.metadata))
            for f in kept
        ],
        kw_only=True,
    )


def _set_defaults(parser: RecipeParser, argv: Sequence[str], verb: str) -> None:
    """Set the recipe's values as defaults, its batches shared among the processes."""
    asked, _ = RecipeParser([RecipeArguments], add_help=False, allow_abbrev=False).parse_known_args(list(argv))
    if asked.recipe is not None:
        recipe = load_recipe(asked.recipe)
        if recipe.verb != verb:
            raise ValueError(f"{recipe.name} is a recipe for `logitmix {recipe.verb}`, not for `logitmix {verb}`")
        parser.set_recipe(recipe.shared_by(asked.num_processes or launched_processes()))
    if asked.dry_run and not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)  # transformers refuses to plan bf16 without a GPU


def _validate_all_read(strings: Sequence[str], where: str, names: Sequence[str], program: str) -> None:
    """Raise `ValueError` where a string of the command line or the config file was read by no flag."""
    for string in strings:
        if string.startswith("--"):
            key = string[2:].split("=")[0].replace("-", "_")
            nearest = get_close_matches(key, names, n=1)
            way_out = f"did you mean {nearest[0]!r}?" if nearest else f"`{program} --help` lists the flags"
            raise ValueError(f"unknown key {key!r} {where}; {way_out}")
    if strings:
        raise ValueError(f"{strings[0]!r} {where} belongs to no flag")
