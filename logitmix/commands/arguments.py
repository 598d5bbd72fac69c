"""Flags and config files: TRL's parser and conventions, with every mistake answered in one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, NoReturn

import yaml
from trl import TrlParser

from logitmix.tasks import TASKS, Task, load_task
from logitmix.tasks.templates import TEMPLATES


@dataclass
class DataArguments:
    """Which problems, and the template in which they are asked."""

    task: str = field(
        default="arithmetic", metadata={"help": f"One of {', '.join(TASKS)}, or your own as module.Class."}
    )
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


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(program: str, description: str, dataclasses: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses from `--config file.yaml` and flags, which go over the file.

    Raises `ValueError` for an unknown key or flag, naming the nearest valid one, and for a value that does not parse.
    """
    parser = _Parser(
        list(dataclasses),
        prog=program,
        description=f"{description} Flags can also stand in a YAML file: --config recipe.yaml.",
        allow_abbrev=False,
    )
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
                nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown key {key!r} {source}; did you mean {nearest!r}?")
        if strings:
            raise ValueError(f"{strings[0]!r} {source} belongs to no flag")
    return tuple(parsed)
