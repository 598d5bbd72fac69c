"""The folder of a run: checks before it starts or resumes, and the record of its start."""

import json
import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from logitmix.runs.console import console
from logitmix.runs.files import RUN_FILE, append_jsonl, drop_lines_after, read_jsonl
from logitmix.runs.provenance import provenance
from logitmix.training.checkpointing.folders import (
    fault,
    half_written,
    last_whole_checkpoint,
    read_state,
    saved_checkpoints,
    validate_has_optimizer,
)

# Files that show that a folder holds a run or a model
RUN_OR_MODEL_FILES = (RUN_FILE, "checkpoint-*", "config.json", "*.safetensors", "*.bin")
# Arguments that may differ between a run and its resumption: how long it trains, and what it logs and saves
IGNORED_ARGUMENTS = {
    *(
        "output_dir",
        "max_steps",
        "num_train_epochs",
        "resume_from_checkpoint",
        "resume_without_optimizer",
        "disable_tqdm",
        "report_to",
        "run_name",
    ),
    *("logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_completions"),
    *("save_steps", "save_strategy", "save_total_limit", "save_frozen", "eval_every", "eval_limit"),
    *("dataloader_num_workers", "report", "report_batch_size"),
    *("num_completions_to_save", "num_completions_to_print", "log_unique_prompts"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"),
}


def find_run_or_model(folder: Path, *more: str) -> str | None:
    """The first pattern of `RUN_OR_MODEL_FILES`, or of `more`, that a file of the folder matches; None without one."""
    return next((pattern for pattern in (*RUN_OR_MODEL_FILES, *more) if list(folder.glob(pattern))), None)


def validate_same_arguments(
    folder: Path, arguments: Mapping[str, Any], ignored: Collection[str] = (), recorded_only: bool = False
) -> None:
    """Raise `ValueError`, with every difference, if `arguments` are not those recorded for the run in the folder.

    With `recorded_only`, arguments that the record lacks are ignored: a library has added them since the run started.
    A folder without a record passes.
    """
    start = read_last_start(folder)
    if start is None:
        return
    before, now = start["arguments"], json.loads(json.dumps(arguments, default=str))
    keys = before if recorded_only else before | now
    changed = [key for key in keys if key not in ignored and before.get(key) != now.get(key)]
    if changed:
        differences = ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{folder} was started with {differences}; continue it with the same arguments, or choose another "
            "--output_dir"
        )


def find_checkpoint(output_dir: str, arguments: Mapping[str, Any], resume: str | None) -> str | None:
    """The checkpoint that a run resumes from, or None to start at step 0. Call it before loading or writing anything.

    `resume` is TRL's `--resume_from_checkpoint`: the folder of a checkpoint, or `true` for the run's last complete
    one. A run that was killed before its first checkpoint starts again.

    Raises `ValueError` if the folder already holds a run or a model; if the checkpoint does not exist, is damaged, has
    no optimizer, or belongs to another run; if the arguments differ from the run's; and if the checkpoint is past the
    last step.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output_dir} is a file; --output_dir must be a folder")
    if resume is None or resume.lower() == "false":
        found = find_run_or_model(folder)
        if found is not None:
            is_run = (folder / RUN_FILE).exists() or saved_checkpoints(folder)
            resumable = is_run and "resume_from_checkpoint" in arguments
            way_out = "continue that run with --resume_from_checkpoint true" if resumable else "remove it"
            raise ValueError(f"{output_dir} holds another run ({found}); choose another --output_dir, or {way_out}")
        return None
    checkpoint = _last_checkpoint(folder) if resume.lower() == "true" else _given_checkpoint(folder, Path(resume))
    validate_same_arguments(folder, arguments, IGNORED_ARGUMENTS, recorded_only=True)
    if checkpoint is None:
        return None
    if not arguments.get("resume_without_optimizer"):
        validate_has_optimizer(checkpoint)
    step, max_steps = checkpoint_step(checkpoint), arguments["max_steps"]
    if 0 < max_steps < step:
        raise ValueError(f"{checkpoint} is at step {step} and max_steps is {max_steps}; raise --max_steps to continue")
    return str(checkpoint)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; None for a run that was stopped before its first."""
    checkpoint, saved = last_whole_checkpoint(folder), saved_checkpoints(folder)
    if checkpoint is None and saved:
        faults = "; ".join(f"{path.name} is incomplete: {fault(path)}" for path in saved)
        raise ValueError(f"there is no checkpoint to resume from in {str(folder)!r}: {faults}")
    if checkpoint is None and read_last_start(folder) is None:
        raise ValueError(f"there is no checkpoint to resume from in {str(folder)!r}")
    return checkpoint


def _given_checkpoint(folder: Path, checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise ValueError(f"there is no checkpoint to resume from in {str(checkpoint)!r}")
    if checkpoint.resolve().parent != folder.resolve():
        raise ValueError(
            f"the checkpoint {checkpoint} does not belong to the run in {folder}; give its own run as --output_dir"
        )
    found = fault(checkpoint)
    if found is not None:
        whole = last_whole_checkpoint(folder)
        way_out = f"the last complete one is {whole}" if whole else "no other is complete; start a new run"
        raise ValueError(f"the checkpoint {checkpoint} is incomplete: {found}; {way_out}")
    return checkpoint


def validate_same_data(output_dir: str, data: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the run in the folder was started on other training data.

    `data` maps a name (`"train"`, …) to a `fingerprint`.
    """
    before = (read_last_start(Path(output_dir)) or {}).get("data") or {}
    then, now = before.get("train"), data.get("train")
    if then is not None and now is not None and then != now:
        raise ValueError(
            f"the run in {output_dir} was started on {then['rows']} training rows with SHA-256 {then['sha256'][:12]}, "
            f"now {now['rows']} with {now['sha256'][:12]}; resume it on the same data"
        )


def rewind(output_dir: str, checkpoint: str | None) -> list[str]:
    """Remove the traces of steps after the checkpoint, which the run repeats; return a sentence for each checkpoint.

    Lines of those steps are dropped from the run's files. Their checkpoints move to a folder `abandoned-<time>`.
    """
    folder = Path(output_dir)
    step = -1 if checkpoint is None else checkpoint_step(Path(checkpoint))
    start = "step 0" if checkpoint is None else checkpoint
    passed_over = [
        f"{name} was only partly written when the run stopped, and is removed" for name in half_written(folder)
    ]
    passed_over += _set_aside(folder, step)
    for line in passed_over:
        console.print(f"{line}; the run continues from {start}.", soft_wrap=True)
    if checkpoint is None and read_last_start(folder) is not None:
        console.print("The run stopped before its first checkpoint, and starts again.")
    for path in folder.glob("*.jsonl"):
        drop_lines_after(path, step)
    return passed_over


def record_start(output_dir: str, arguments: Mapping[str, Any], **more: Any) -> None:
    """Add a line to `run.jsonl`: the arguments, `more` about this start, and the provenance (`runs.provenance`)."""
    path = Path(output_dir) / RUN_FILE
    if path.exists():
        drop_lines_after(path, step=None)
    start = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "resumed_from": None}
    append_jsonl(path, [start | more | {"arguments": arguments} | provenance()])


def _set_aside(folder: Path, step: int) -> list[str]:
    """Move checkpoints of later steps, damaged or not, into a folder of their own; return a sentence for each."""
    later = [path for path in saved_checkpoints(folder) if int(path.name.rpartition("-")[2]) > step]
    aside = folder / f"abandoned-{datetime.now():%Y%m%d-%H%M%S}"
    sentences = []
    for path in later:
        found = fault(path)
        aside.mkdir(exist_ok=True)
        os.rename(path, aside / path.name)
        sentences.append(
            f"{path.name} {f'is incomplete: {found}' if found else 'is of a later step'}; it is in {aside}"
        )
    return sentences


def read_last_start(folder: Path) -> dict[str, Any] | None:
    """The last line of the folder's `run.jsonl`; None without one."""
    path = folder / RUN_FILE
    starts = read_jsonl(path) if path.exists() else []
    return starts[-1] if starts else None


def checkpoint_step(checkpoint: Path) -> int:
    return int(read_state(checkpoint)["global_step"])
