"""The files of a run's folder: their names, and reading and writing JSON lines."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitmix.mixture.frozen.references import sync
from logitmix.training.checkpointing.folders import explained_write_errors

RUN_FILE = "run.jsonl"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVALUATION_RESPONSES_FILE = "evaluation_responses.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
RESPONSES_FILE = "responses.jsonl"
SWEEP_FILE = "sweep.json"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last line that was cut by a kill.

    Raises `ValueError` for a file that does not exist or is not JSON lines.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines ({error}); give another file or folder") from error


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file, which is made if necessary. Raises `OSError` with one sentence if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained_write_errors(path.parent, path.name), path.open("a") as file:
        file.write("".join(json.dumps(row, default=str) + "\n" for row in rows))


def drop_lines_after(path: Path, step: int | None) -> None:
    """Drop a truncated last line, lines of steps after `step`, and the summary of a finished training.

    Lines without a step are kept; with `step=None` only a truncated line is dropped. The file is replaced atomically.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _is_kept(json.loads(line), step)]
    if len(kept) == len(lines):
        return
    replacement = path.with_name(path.name + ".new")
    replacement.write_bytes(b"".join(kept))
    sync(replacement)
    os.replace(replacement, path)


def _is_kept(row: Mapping[str, Any], step: int | None) -> bool:
    return step is None or "step" not in row or (row["step"] <= step and "train_runtime" not in row)
