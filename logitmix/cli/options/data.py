"""Flags for tasks and problems. A checkpoint is evaluated on the problems of the run that made it, unless told."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from logitmix.cli.options.validation import validate_at_least
from logitmix.runs.files import RUN_FILE, read_jsonl
from logitmix.tasks import TASKS, Task, load_task
from logitmix.tasks.base import Verifier
from logitmix.tasks.templates import TEMPLATES


@dataclass
class SourceArguments:
    """Data and template"""

    data: str | None = field(
        default=None, metadata={"help": "Local folder or file with the problems, instead of the dataset on the hub."}
    )
    template: str | None = field(
        default=None,
        metadata={"help": f"Prompt template, instead of the task's own: {', '.join(TEMPLATES)}, or a YAML file."},
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of the question; default: question."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of the answer; default: answer."}
    )
    solution_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of a worked solution, which SFT needs."}
    )


@dataclass
class DataArguments(SourceArguments):
    """Task and data"""

    task: str = field(
        default="arithmetic", metadata={"help": f"{', '.join(TASKS)}, or a class of your own as module.Class."}
    )
    split_seed: int = field(
        default=0,
        metadata={"help": "Seed of the splits; independent of --seed, so that training never sees test problems."},
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


CHAT_TEMPLATE_HELP = (
    "Arguments for the chat template that renders the prompts, as JSON such as '{\"enable_thinking\": false}'."
)


def parse_chat_template_kwargs(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The object in the JSON of a flag. Raises `ValueError` for anything else."""
    if given is None or isinstance(given, dict):
        return given
    try:
        parsed = json.loads(given)
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(
            f"chat_template_kwargs is {given!r}, which is not a JSON object; write it as in "
            "--chat_template_kwargs '{\"enable_thinking\": false}'"
        )
    return parsed


@dataclass
class RenderedDataArguments(DataArguments):
    """Task and data"""

    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_HELP})

    def __post_init__(self) -> None:
        self.chat_template_kwargs = parse_chat_template_kwargs(self.chat_template_kwargs)

    def load(self) -> Task:
        task = super().load()
        assert not isinstance(self.chat_template_kwargs, str)
        task.chat_template_kwargs = self.chat_template_kwargs or {}
        return task


@dataclass
class TaskArguments(DataArguments):
    """Task and data"""

    train_limit: int | None = field(
        default=None, metadata={"help": "Number of training problems, from the first; default: all."}
    )
    eval_limit: int = field(default=200, metadata={"help": "Number of test problems, from the first."})

    def __post_init__(self) -> None:
        validate_at_least(self, train_limit=1, eval_limit=1)


@dataclass
class CheckpointDataArguments(SourceArguments):
    """Task and data; default: those of the run that made the checkpoint"""

    task: str | None = field(
        default=None,
        metadata={"help": "Task, as in training; default: that of the checkpoint's run, else arithmetic."},
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the splits; default: that of the checkpoint's run, else 0."}
    )
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_HELP})

    def __post_init__(self) -> None:
        self.chat_template_kwargs = parse_chat_template_kwargs(self.chat_template_kwargs)

    def resolve(self, *checkpoints: str | None) -> RenderedDataArguments:
        """The data to evaluate checkpoints on: what the flags give and, for the rest, what the checkpoints' runs used.

        That includes the seed of the splits: with another one, training problems would be among the test problems.
        Ignored are None, checkpoints without a run of logitmix, and runs on a task other than `--task`.

        Raises `ValueError` if the runs differ in what the flags leave open.
        """
        given = {f.name: value for f in fields(RenderedDataArguments) if (value := getattr(self, f.name)) is not None}
        found = {source: data for source in checkpoints if source is not None and (data := read_run_data(source))}
        if self.task is not None:
            found = {source: data for source, data in found.items() if data["task"] == self.task}
        resolved: dict[str, Any] = dict(given)
        read_from: dict[str, str] = {}
        for source, data in found.items():
            for key, value in data.items():
                if key in given:
                    continue
                if resolved.setdefault(key, value) != value:
                    raise ValueError(
                        f"the run of {read_from[key]} had {key} {resolved[key]!r}, and that of {source} {value!r}; "
                        f"choose one with --{key}"
                    )
                read_from.setdefault(key, source)
        return RenderedDataArguments(**resolved)


@dataclass
class TestProblemArguments(CheckpointDataArguments):
    """Task and data; default: those of the run that made the checkpoint"""

    eval_limit: int = field(default=200, metadata={"help": "Number of test problems, from the first."})
    verifier: Verifier = field(
        default="strict",
        metadata={
            "help": "Of the lenient column: lenient also accepts radians for degrees, a ratio for a fraction, a "
            "decimal rounded to three digits, and tuples in any order. The answer column and the reward are strict."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        validate_at_least(self, eval_limit=1)

    def resolve_task(self, *checkpoints: str | None) -> tuple[RenderedDataArguments, Task]:
        """The data to evaluate checkpoints on, as `resolve` finds it, and its task with this verifier."""
        data = self.resolve(*checkpoints)
        task = data.load()
        task.verifier = self.verifier
        return data, task


def read_run_data(checkpoint: str) -> dict[str, Any] | None:
    """The values of `RenderedDataArguments` in the `run.jsonl` of the run that made a checkpoint.

    None without such a run. The column of solutions is left out: only SFT reads it.
    """
    arguments = read_run_arguments(checkpoint)
    if arguments is None or not isinstance(arguments.get("task"), str):
        return None
    names = [f.name for f in fields(RenderedDataArguments) if f.name != "solution_column"]
    return {name: arguments[name] for name in names if name in arguments}


def read_run_arguments(checkpoint: str) -> dict[str, Any] | None:
    """The arguments of the last start of the run that made a checkpoint; None without such a run."""
    folder = Path(checkpoint).resolve()  # gives "." and links their name and parent
    for path in (folder / RUN_FILE, folder.parent / RUN_FILE):  # in the parent for a checkpoint-N
        if path.is_file() and (path.parent == folder or folder.name.startswith("checkpoint-")):
            starts = read_jsonl(path)
            arguments = starts[-1].get("arguments") if starts and isinstance(starts[-1], dict) else None
            if isinstance(arguments, dict):
                return arguments
    return None
