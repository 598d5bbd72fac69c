"""The names of the files in a run's folder, and the reader of their JSON lines."""

import json
from pathlib import Path
from typing import Any

RUN_FILE = "run.jsonl"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
RESPONSES_FILE = "responses.jsonl"
SWEEP_FILE = "sweep.json"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; an unfinished last line, left by a killed process, is skipped.

    Raises `ValueError` for a file that does not exist or does not hold JSON lines.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines ({error}); give another file or folder") from error
