"""The folder of a run: which checkpoint to resume from, what a resume discards, and the record of each start."""

import json
import os
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from logitmix.runs.files import RUN_FILE, read_jsonl
from logitmix.runs.provenance import provenance
from logitmix.training.checkpointing.folders import (
    explained_write_errors,
    fault,
    half_written,
    last_whole_checkpoint,
    read_state,
    saved_checkpoints,
    sync,
)

# A folder with one of these holds a run or a model, and must not be overwritten
HELD = (RUN_FILE, "checkpoint-*", "config.json", "*.safetensors", "*.bin")
# Arguments that a resume may change: how long the run is, and what it logs and saves
IGNORED_ARGUMENTS = {
    *(
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "resume_from_checkpoint",
        "disable_tqdm",
        "report_to",
        "run_name",
    ),
    *("logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_completions"),
    *("save_steps", "save_strategy", "save_total_limit", "eval_every", "eval_limit", "dataloader_num_workers"),
    *("num_completions_to_save", "num_completions_to_print", "log_unique_prompts"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
}

# Messages go to standard error: a command's standard output is its result.
console = Console(stderr=True)


def find_checkpoint(output_dir: str, arguments: Mapping[str, Any], resume: str | None) -> str | None:
    """The checkpoint to resume from, or None to start at step 0. Call it before anything is loaded or written.

    `resume` is TRL's `--resume_from_checkpoint`: a checkpoint's folder, or `true` for the run's last complete one. A
    run that was killed before its first checkpoint starts again.

    Raises `ValueError` for a folder that already holds a run or a model, for a checkpoint that does not exist, is
    damaged, belongs to another run or is past the last step, and for arguments that differ from the run's.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output_dir} is a file; --output_dir must be a folder")
    if resume is None or resume.lower() == "false":
        held = next((name for name in HELD if list(folder.glob(name))), None)
        if held is not None:
            is_run = (folder / RUN_FILE).exists() or saved_checkpoints(folder)
            resumable = is_run and "resume_from_checkpoint" in arguments
            way_out = "continue that run with --resume_from_checkpoint true" if resumable else "remove it"
            raise ValueError(f"{output_dir} holds another run ({held}); choose another --output_dir, or {way_out}")
        return None
    checkpoint = _last_checkpoint(folder) if resume.lower() == "true" else _given_checkpoint(folder, Path(resume))
    before = _last_start(folder)
    if before is not None:
        # flags that a later version added are no difference
        known = {key: value for key, value in arguments.items() if key in before["arguments"]}
        validate_same_arguments(output_dir, before["arguments"], known, IGNORED_ARGUMENTS, "resume it with the same")
    if checkpoint is None:
        return None
    step, max_steps = checkpoint_step(checkpoint), arguments["max_steps"]
    if 0 < max_steps < step:
        raise ValueError(f"{checkpoint} is at step {step} and max_steps is {max_steps}; raise --max_steps to go on")
    return str(checkpoint)


def validate_same_arguments(
    folder: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], ignored: Container[str], way_out: str
) -> None:
    """Raise `ValueError` where a run in the folder was started with other arguments, leaving out those `ignored`."""
    now = json.loads(json.dumps(now, default=str))  # as `before` was written and read
    changed = [key for key in dict.fromkeys((*before, *now)) if key not in ignored and before.get(key) != now.get(key)]
    if changed:
        differences = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(f"the run in {folder} was started with {differences}; {way_out}")


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; None for a run that was stopped before its first."""
    checkpoint, saved = last_whole_checkpoint(folder), saved_checkpoints(folder)
    if checkpoint is None and saved:
        faults = "; ".join(f"{path.name} is not whole: {fault(path)}" for path in saved)
        raise ValueError(f"there is no checkpoint to resume from in {str(folder)!r}: {faults}")
    if checkpoint is None and _last_start(folder) is None:
        raise ValueError(f"there is no checkpoint to resume from in {str(folder)!r}")
    return checkpoint


def _given_checkpoint(folder: Path, checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise ValueError(f"there is no checkpoint to resume from in {str(checkpoint)!r}")
    if checkpoint.resolve().parent != folder.resolve():
        raise ValueError(f"the checkpoint {checkpoint} is not of the run in {folder}; make that the --output_dir")
    found = fault(checkpoint)
    if found is not None:
        whole = last_whole_checkpoint(folder)
        way_out = f"the last whole one is {whole}" if whole else "no other is whole; start a new run"
        raise ValueError(f"the checkpoint {checkpoint} is not whole: {found}; {way_out}")
    return checkpoint


def validate_same_data(output_dir: str, data: Mapping[str, Any]) -> None:
    """Raise `ValueError` where the run in the folder was started on other training data. `data` holds fingerprints."""
    before = (_last_start(Path(output_dir)) or {}).get("data") or {}
    then, now = before.get("train"), data.get("train")
    if then is not None and now is not None and then != now:
        raise ValueError(
            f"the run in {output_dir} was started on {then['rows']} training rows with SHA-256 {then['sha256'][:12]}, "
            f"now {now['rows']} with {now['sha256'][:12]}; resume it on the same data"
        )


def rewind(output_dir: str, checkpoint: str | None) -> list[str]:
    """Remove from the folder what belongs to steps after the checkpoint, which the run repeats.

    Lines of its files are dropped, and checkpoints are moved aside. Returns a sentence for each of the latter.
    """
    folder = Path(output_dir)
    step = -1 if checkpoint is None else checkpoint_step(Path(checkpoint))
    start = "step 0" if checkpoint is None else checkpoint
    passed_over = [f"{name} was half written when the run stopped, and is removed" for name in half_written(folder)]
    passed_over += _set_aside(folder, step)
    for line in passed_over:
        console.print(f"{line}; the run continues from {start}.", soft_wrap=True)
    if checkpoint is None and _last_start(folder) is not None:
        console.print("The run stopped before its first checkpoint; it starts again.")
    for path in folder.glob("*.jsonl"):
        drop_lines_after(path, step)
    return passed_over


def record_start(output_dir: str, arguments: Mapping[str, Any], **more: Any) -> None:
    """Append a line to the run's `run.jsonl`: its arguments, `more` about this start, and its provenance."""
    path = Path(output_dir) / RUN_FILE
    if path.exists():
        drop_lines_after(path, step=None)
    begun = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from": None}
    append_jsonl(path, [begun | more | {"arguments": arguments} | provenance()])


def _set_aside(folder: Path, step: int) -> list[str]:
    """Move checkpoints of later steps, damaged or not, into a folder of their own. Returns a sentence for each."""
    later = [path for path in saved_checkpoints(folder) if int(path.name.rpartition("-")[2]) > step]
    aside = folder / f"abandoned-{datetime.now():%Y%m%d-%H%M%S}"
    sentences = []
    for path in later:
        found = fault(path)
        aside.mkdir(exist_ok=True)
        os.rename(path, aside / path.name)
        sentences.append(f"{path.name} {f'is not whole: {found}' if found else 'is of later steps'}; it is in {aside}")
    return sentences


def drop_lines_after(path: Path, step: int | None) -> None:
    """Drop an unfinished last line, lines of steps after `step`, and the summary of a finished training.

    Lines without a step are kept, and so are all complete lines if `step` is None. The file is replaced atomically.
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


def _last_start(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    starts = read_jsonl(path) if path.exists() else []
    return starts[-1] if starts else None


def checkpoint_step(checkpoint: Path) -> int:
    return int(read_state(checkpoint)["global_step"])


def quiet_libraries() -> None:
    """Hide the progress bars of transformers and datasets in favour of ours."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file. Raises `OSError` with one sentence where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained_write_errors(path.parent, path.name), path.open("a") as file:
        file.write("".join(json.dumps(row, default=str) + "\n" for row in rows))


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )
