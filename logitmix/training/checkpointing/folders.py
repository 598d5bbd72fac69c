"""Checkpoint folders that are either whole or absent.

A checkpoint is written to `.saving/checkpoint-N` in the run's folder, with a list of its files and their sizes. Once
every byte is on disk, a rename makes it `checkpoint-N`. A process killed before that leaves the run unchanged, and the
list reveals a file that was truncated or lost later.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from logitmix.mixture.frozen.references import store_fault, sync

STAGING = ".saving"
FILE_LIST = "checkpoint_files.json"
STATE_FILE = "trainer_state.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def publish(staged: Path, checkpoint: Path) -> None:
    """Rename the finished folder `staged` to `checkpoint`, replacing an existing one."""
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in _files(staged)}
    (staged / FILE_LIST).write_text(json.dumps(sizes, indent=1))
    # The run's logs of the steps so far must reach the disk before the checkpoint
    for path in [*_files(staged), *checkpoint.parent.glob("*.jsonl")]:
        sync(path)
    for folder in [*(path for path in staged.rglob("*") if path.is_dir()), staged]:
        sync(folder)
    if checkpoint.exists():
        os.rename(checkpoint, staged.parent / f"replaced-{checkpoint.name}")
    os.rename(staged, checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(staged.parent)


def saved_checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoints, whole or damaged, in order of their steps."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run_folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__)


def half_written(run_folder: Path) -> list[str]:
    """The names of the checkpoints that were being written when the run was killed."""
    return [path.name for path in sorted((run_folder / STAGING).glob("checkpoint-*"))]


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole, judging by the names and sizes of its files.

    The frozen weights that it refers to count as its files.
    A checkpoint of another trainer, without a list of files, counts as whole if its state can be read.
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
        listed = checkpoint / FILE_LIST
        sizes: dict[str, int] = json.loads(listed.read_text()) if listed.exists() else {}
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except ValueError:
        return f"its {STATE_FILE} or {FILE_LIST} is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.exists():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} of {size} bytes"
    try:
        return store_fault(checkpoint)
    except ValueError as error:
        return str(error)


def last_whole_checkpoint(run_folder: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    return next((path for path in reversed(saved_checkpoints(run_folder)) if fault(path) is None), None)


def validate_has_optimizer(checkpoint: Path) -> None:
    """Raise `ValueError` for a checkpoint that holds the model only: `Trainer` would restart its schedule silently."""
    found = {path.name for path in checkpoint.iterdir()}
    if not any(name.endswith((".safetensors", ".bin")) for name in found):
        return  # no model either, which is said where it is loaded
    # of one process, of FSDP (shards too), and of DeepSpeed, which keeps its own together with the weights
    has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in found)
    has_scheduler = "scheduler.pt" in found or any(name.startswith("global_step") for name in found)
    if not (has_optimizer and has_scheduler):
        lacks = " and ".join(
            name for name, has in (("optimizer", has_optimizer), ("schedule", has_scheduler)) if not has
        )
        raise ValueError(
            f"the checkpoint {checkpoint} has no {lacks}, as save_only_model leaves them out, so the run could not "
            "continue where it stopped; start a new run with the checkpoint as the model, or set "
            "resume_without_optimizer to resume it with a new optimizer and schedule"
        )


@contextmanager
def explained_write_errors(folder: Path, what: str, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Raise `OSError` with one sentence where writing `what` into `folder` fails because the disk is full.

    `needed` returns about how many bytes it takes. A half-written checkpoint is removed, so that other programs can
    write again.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_full(error):
            raise
        free = shutil.disk_usage(folder).free
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        whole = last_whole_checkpoint(folder)
        kept = f"{whole} is whole, so the run can resume from it" if whole else "no checkpoint was saved before it"
        size = "" if needed is None else f"it takes about {_format_bytes(needed())}, and "
        raise OSError(
            f"{what} could not be written to {folder}: {size}{_format_bytes(free)} are free there, or a quota or "
            f"limit is reached; {kept}. Make room (--save_total_limit 1 keeps one checkpoint) and use "
            "--resume_from_checkpoint true"
        ) from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    # safetensors and torch.save raise their own errors, with or without the system's message
    system_errors = [os.strerror(number) for number in NO_ROOM]
    return any(text in str(error) for text in [*system_errors, "PytorchStreamWriter", "inline_container.cc"])


def _format_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state in a checkpoint, with the names of transformers' `TrainerState`."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return state
