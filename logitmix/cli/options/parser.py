"""Flags, config files and recipes: TRL's parser and conventions, with every mistake answered in one sentence."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import yaml
from trl import TrlParser

from logitmix.paper.recipes import Recipe, load_recipe
from logitmix.tasks import TASKS, Task, load_task
from logitmix.tasks.templates import TEMPLATES


@dataclass
class SourceArguments:
    """Where the problems come from, and the template in which they are asked."""

    data: str | None = field(default=None, metadata={"help": "Local folder or file, in place of the hub's data."})
    template: str | None = field(
        default=None,
        metadata={"help": f"In place of the task's own: one of {', '.join(TEMPLATES)}, or a YAML file with yours."},
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Of the task jsonl: the column with the question, default 'question'."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Of the task jsonl: the column with the answer, default 'answer'."}
    )
    solution_column: str | None = field(
        default=None, metadata={"help": "Of the task jsonl: the column with a worked solution, which SFT needs."}
    )


@dataclass
class DataArguments(SourceArguments):
    """Which problems, and the template in which they are asked."""

    task: str = field(
        default="arithmetic", metadata={"help": f"One of {', '.join(TASKS)}, or your own as module.Class."}
    )
    split_seed: int = field(
        default=0,
        metadata={"help": "Seed of the splits; apart from --seed, so that training never sees test problems."},
    )

    def load(self) -> Task:
        return load_task(
            self.task,
            data=self.data,
            seed=self.split_seed,
            template=self.template,
            question_column=self.question_column,
            answer_column=self.answer_column,
            solution_column=self.solution_column,
        )


@dataclass
class TaskArguments(DataArguments):
    """Which problems, and how many of them."""

    train_limit: int | None = field(default=None, metadata={"help": "Train on the first so many problems only."})
    eval_limit: int = field(default=200, metadata={"help": "Evaluate on the first so many test problems."})

    def __post_init__(self) -> None:
        require_at_least(self, train_limit=1, eval_limit=1)


@dataclass(kw_only=True)
class LoadingArguments:
    """How a checkpoint is loaded."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Dtype of the weights; auto is the checkpoint's own."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, …"})

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}


@dataclass(kw_only=True)
class ModelArguments(LoadingArguments):
    """Which checkpoint, and how it is loaded."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model (of the policy, in training)."})


@dataclass
class EvaluationArguments:
    """What is evaluated and written down while training runs, and validation for the weight."""

    eval_every: int | None = field(
        default=None, metadata={"help": "Optimizer steps between greedy evaluations on test problems."}
    )
    validation_source: Literal["held_out", "train"] = field(
        default="held_out",
        metadata={
            "help": "Where an alpha_controller that validates takes its questions: the last of the train split, which "
            "are not trained on; or fresh training questions at each step, not trained on in that pass."
        },
    )
    num_completions_to_save: int = field(
        default=64, metadata={"help": "Of every generation, so many go to completions.jsonl with rewards; 0: none."}
    )

    def __post_init__(self) -> None:
        require_at_least(self, eval_every=1, num_completions_to_save=0)


@dataclass
class RecipeArguments:
    """A recipe by its name, and the dry run of whatever was asked for."""

    recipe: str | None = field(
        default=None,
        metadata={"help": "Settings by name, such as math/3b/fixed_mixing; `logitmix recipes` lists the names."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print settings, token budget and memory, and train nothing."}
    )
    device_memory: str | None = field(
        default=None, metadata={"help": "For the dry run: a device's memory, such as 80GiB; default that of the GPU."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "For the dry run: processes, one a device; default as many as were started."}
    )
    sharded: bool = field(
        default=False, metadata={"help": "For the dry run: FSDP or ZeRO-3 spreads the weights; default as started."}
    )
    prompt_length: int = field(default=1024, metadata={"help": "For the dry run: tokens of the longest prompt."})
    # where each value comes from that is no default, by key
    sources: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("device_memory", "num_processes", "sharded"):
            if getattr(self, key) and not self.dry_run:
                raise ValueError(f"--{key} is for --dry_run alone; add that, or leave it out")
        require_at_least(self, num_processes=1, prompt_length=1)

    @property
    def processes(self) -> int:
        return self.num_processes or started_processes()


def require_at_least(arguments: Any, **limits: int) -> None:
    """Raise `ValueError` for a flag below its limit; one that is not given, None, is not looked at."""
    for key, limit in limits.items():
        value = getattr(arguments, key)
        if value is not None and value < limit:
            raise ValueError(f"--{key} is {value}, but must be at least {limit}")


def started_processes() -> int:
    """How many processes `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", 1))


class _Parser(TrlParser):
    """TRL's parser over a recipe: a config file goes over the recipe, and flags over both."""

    recipe: Recipe | None = None
    keys_of_file: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def lay_under(self, recipe: Recipe) -> None:
        """Make the recipe's values the defaults."""
        self.recipe = recipe
        unknown = super().set_defaults_with_config(**{key: v.value for key, v in recipe.values.items()})
        assert not unknown, f"the recipe {recipe.name} has keys that are no flags: {unknown}"

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self.keys_of_file = tuple(config)
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        for key in self.recipe.values if self.recipe else ():
            if getattr(namespace, key) == "{model_name_or_path}":
                setattr(namespace, key, namespace.model_name_or_path)
        return namespace, rest

    def sources(self, argv: Sequence[str]) -> dict[str, str]:
        """Where each value comes from, by key; what is not there is a default."""
        options = [string.split("=")[0] for string in argv if string.startswith("--")]
        flags = {self._option_string_actions[o].dest: "flag" for o in options if o in self._option_string_actions}
        recipe = {key: str(value) for key, value in self.recipe.values.items()} if self.recipe else {}
        return recipe | dict.fromkeys(self.keys_of_file, "config file") | flags


def _lay_recipe(parser: _Parser, argv: Sequence[str], verb: str) -> None:
    """Lay the recipe that the flags name under all else, its batches shared by as many processes as there are."""
    asked, _ = _Parser([RecipeArguments], add_help=False, allow_abbrev=False).parse_known_args(list(argv))
    if asked.recipe is not None:
        recipe = load_recipe(asked.recipe)
        if recipe.verb != verb:
            raise ValueError(f"{recipe.name} is a recipe for `logitmix {recipe.verb}`, not for `logitmix {verb}`")
        parser.lay_under(recipe.shared_by(asked.num_processes or started_processes()))
    if asked.dry_run and not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)  # transformers refuses to plan bf16 where there is no GPU


def parse(program: str, description: str, dataclasses: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses: flags go over `--config file.yaml`, and that over `--recipe name`.

    `program` ends in the command's verb. A recipe can be given where the dataclasses have `RecipeArguments`.

    Raises `ValueError` for an unknown key or flag, naming the nearest valid one, and for a value that does not parse.
    """
    parser = _Parser(
        list(dataclasses),
        prog=program,
        description=f"{description} Flags can also stand in a YAML file: --config recipe.yaml.",
        allow_abbrev=False,
    )
    if RecipeArguments in dataclasses:
        _lay_recipe(parser, argv, program.split()[-1])
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
    known = [f.name for dataclass_type in dataclasses for f in fields(dataclass_type) if f.init]
    for source, strings in (("in the config file", from_config), ("on the command line", from_flags)):
        for string in strings:
            if string.startswith("--"):
                key = string[2:].split("=")[0].replace("-", "_")
                nearest = get_close_matches(key, known, n=1)
                way_out = f"did you mean {nearest[0]!r}?" if nearest else f"`{program} --help` lists the flags"
                raise ValueError(f"unknown key {key!r} {source}; {way_out}")
        if strings:
            raise ValueError(f"{strings[0]!r} {source} belongs to no flag")
    for instance in parsed:
        if isinstance(instance, RecipeArguments):
            instance.sources = parser.sources(argv)
    return tuple(parsed)


def require_distinct(sources: Sequence[str], what: str) -> None:
    """Raise `ValueError` where a file or folder stands twice among those to compare."""
    paths = [Path(source).resolve() for source in sources]
    for i, source in enumerate(sources):
        if paths[i] in paths[:i]:
            raise ValueError(f"the {what} {source} is given twice, and would be compared with itself; give it once")
