"""Which problems a checkpoint is looked at with: those that the flags name, or else those of the run that made it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from logitmix.cli.options.parser import DataArguments, SourceArguments, require_at_least
from logitmix.runs.files import RUN_FILE, read_jsonl


@dataclass
class RunsDataArguments(SourceArguments):
    """As `DataArguments`; what is not given is that of the checkpoint's run, unless `--task` names another task."""

    task: str | None = field(
        default=None,
        metadata={"help": "As in training; default that of the run that made the checkpoint, or else arithmetic."},
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "Seed of the splits; default that of the checkpoint's run, or else 0."}
    )

    def of_runs(self, *checkpoints: str | None) -> DataArguments:
        """The data that the checkpoints are to be looked at with.

        None, a checkpoint that no run of ours made, and a run on another task than `--task` say nothing. A run on the
        same one does: with another seed of the splits, its training problems would be among the test problems.

        Raises `ValueError` where the runs differ in what the flags leave open.
        """
        given = {f.name: value for f in fields(DataArguments) if (value := getattr(self, f.name)) is not None}
        found = {source: data for source in checkpoints if source is not None and (data := data_of_run(source))}
        if self.task is not None:
            found = {source: data for source, data in found.items() if data["task"] == self.task}
        settled = {source: data | given for source, data in found.items()}
        for source, data in settled.items():
            first = next(iter(settled))
            for key, value in data.items():
                if value != settled[first][key]:
                    raise ValueError(
                        f"the run of {first} had the {key} {settled[first][key]!r}, and that of {source} {value!r}; "
                        f"say which with --{key}"
                    )
        return DataArguments(**next(iter(settled.values()), given))


@dataclass
class TestProblemArguments(RunsDataArguments):
    """Which test problems."""

    eval_limit: int = field(default=200, metadata={"help": "Evaluate on the first so many test problems."})

    def __post_init__(self) -> None:
        require_at_least(self, eval_limit=1)


def data_of_run(checkpoint: str) -> dict[str, Any] | None:
    """The `DataArguments` of the run that made a checkpoint, by its `run.jsonl`; None where there is none of ours.

    All but the column of the solutions, which SFT alone reads.
    """
    folder = Path(checkpoint).resolve()  # its own name and its parent, also of "." and of a link
    for path in (folder / RUN_FILE, folder.parent / RUN_FILE):  # the parent's: of a checkpoint-N
        if path.is_file() and (path.parent == folder or folder.name.startswith("checkpoint-")):
            starts = read_jsonl(path)
            arguments = starts[-1].get("arguments") if starts and isinstance(starts[-1], dict) else None
            if isinstance(arguments, dict) and isinstance(arguments.get("task"), str):
                names = [f.name for f in fields(DataArguments) if f.name != "solution_column"]
                return {name: arguments[name] for name in names if name in arguments}
    return None
