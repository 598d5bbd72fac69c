"""Flags that name a task, its data and its template; of a checkpoint, those of the run that made it by default."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from logitmix.cli.options.validation import validate_at_least
from logitmix.runs.files import RUN_FILE, read_jsonl
from logitmix.tasks import TASKS, Task, load_task
from logitmix.tasks.templates import TEMPLATES


@dataclass
class SourceArguments:
    """Where the problems come from, and the template that asks them."""

    data: str | None = field(default=None, metadata={"help": "Local file or folder to read instead of the hub."})
    template: str | None = field(
        default=None,
        metadata={"help": f"Instead of the task's own template: {', '.join(TEMPLATES)}, or a YAML file."},
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of the question, default 'question'."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of the answer, default 'answer'."}
    )
    solution_column: str | None = field(
        default=None, metadata={"help": "Task jsonl: column of the worked solution, which SFT needs."}
    )


@dataclass
class DataArguments(SourceArguments):
    """Which problems, and the template that asks them."""

    task: str = field(default="arithmetic", metadata={"help": f"{', '.join(TASKS)}, or your own as module.Class."})
    split_seed: int = field(
        default=0,
        metadata={"help": "Seed of the splits, apart from --seed, so that no run trains on another's test problems."},
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
    """Which problems to train and evaluate on, and how many."""

    train_limit: int | None = field(default=None, metadata={"help": "Train on the first N problems; default all."})
    eval_limit: int = field(default=200, metadata={"help": "Evaluate on the first N test problems."})

    def __post_init__(self) -> None:
        validate_at_least(self, train_limit=1, eval_limit=1)


@dataclass
class CheckpointDataArguments(SourceArguments):
    """As `DataArguments`, with defaults from the run that made the checkpoint, unless `--task` names another task."""

    task: str | None = field(
        default=None,
        metadata={"help": "As in training; default that of the run that made the checkpoint, or arithmetic."},
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the splits; default that of the checkpoint's run, or 0."}
    )

    def resolve(self, *checkpoints: str | None) -> DataArguments:
        """The data to evaluate the checkpoints on: the flags given, and for the rest what their runs used.

        A run on another task than `--task` is ignored. A run on the same task is not: with another seed of the
        splits, its training problems would be among the test problems.

        Raises `ValueError` where the runs differ in a setting that no flag decides.
        """
        given = {f.name: value for f in fields(DataArguments) if (value := getattr(self, f.name)) is not None}
        of_runs = {source: data for source in checkpoints if source is not None and (data := data_of_run(source))}
        if self.task is not None:
            of_runs = {source: data for source, data in of_runs.items() if data["task"] == self.task}
        resolved = {source: data | given for source, data in of_runs.items()}
        for source, data in resolved.items():
            first = next(iter(resolved))
            for key, value in data.items():
                if value != resolved[first][key]:
                    raise ValueError(
                        f"the run of {first} had the {key} {resolved[first][key]!r}, and that of {source} {value!r}; "
                        f"choose one with --{key}"
                    )
        return DataArguments(**next(iter(resolved.values()), given))


@dataclass
class TestProblemArguments(CheckpointDataArguments):
    """Which test problems, and how many."""

    eval_limit: int = field(default=200, metadata={"help": "Evaluate on the first N test problems."})

    def __post_init__(self) -> None:
        validate_at_least(self, eval_limit=1)


def data_of_run(checkpoint: str) -> dict[str, Any] | None:
    """The `DataArguments` of the run that made a checkpoint, from its `run.jsonl`; None without such a run.

    The column of the solutions is left out, since only SFT reads it.
    """
    folder = Path(checkpoint).resolve()  # follows "." and links to the folder's own name and parent
    for path in (folder / RUN_FILE, folder.parent / RUN_FILE):  # the parent is the run of a checkpoint-N
        if path.is_file() and (path.parent == folder or folder.name.startswith("checkpoint-")):
            starts = read_jsonl(path)
            arguments = starts[-1].get("arguments") if starts and isinstance(starts[-1], dict) else None
            if isinstance(arguments, dict) and isinstance(arguments.get("task"), str):
                names = [f.name for f in fields(DataArguments) if f.name != "solution_column"]
                return {name: arguments[name] for name in names if name in arguments}
    return None
