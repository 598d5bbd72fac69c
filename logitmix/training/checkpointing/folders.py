"""Checkpoint folders that are whole or not there.

A checkpoint is written under a name that nothing takes for a checkpoint, `.saving/checkpoint-N` in the run's folder,
with a list of its files and their sizes. When every byte is on the disk, a rename makes it `checkpoint-N`: a process
killed before that leaves the run as it was, and the list shows a file that was cut or lost later.
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

STAGING = ".saving"
FILE_LIST = "checkpoint_files.json"
STATE_FILE = "trainer_state.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def publish(staged: Path, checkpoint: Path) -> None:
    """Make the finished folder `staged` the checkpoint, in the place of one that is there already."""
    sizes = {str(path.relative_to(staged)): path.stat().st_size for path in _files(staged)}
    (staged / FILE_LIST).write_text(json.dumps(sizes, indent=1))
    # What the run's other files say of the steps so far must not come to the disk later than the checkpoint
    for path in [*_files(staged), *checkpoint.parent.glob("*.jsonl")]:
        sync(path)
    for folder in [*(path for path in staged.rglob("*") if path.is_dir()), staged]:
        sync(folder)
    if checkpoint.exists():
        os.rename(checkpoint, staged.parent / f"replaced-{checkpoint.name}")
    os.rename(staged, checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(staged.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved_checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoints, whole or damaged, in the order of their steps."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run_folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__)


def half_written(run_folder: Path) -> list[str]:
    """The names of the checkpoints that were being written when the run was killed."""
    return [path.name for path in sorted((run_folder / STAGING).glob("checkpoint-*"))]


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole, as far as the names and sizes of its files tell.

    One without a list of its files, as other trainers leave it, is whole if its state can be read.
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
    return None


def last_whole_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of the most steps that is whole."""
    return next((path for path in reversed(saved_checkpoints(run_folder)) if fault(path) is None), None)


@contextmanager
def explained_write_errors(folder: Path, what: str, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Raise `OSError` of one sentence where writing `what` into `folder` fails for want of room.

    `needed` tells about how many bytes it takes. What was half written as a checkpoint is removed, since a full disk
    stops whatever else writes to it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_want_of_room(error):
            raise
        free = shutil.disk_usage(folder).free
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        whole = last_whole_checkpoint(folder)
        kept = f"{whole} is whole, so the run can go on from there" if whole else "no checkpoint was saved before it"
        size = "" if needed is None else f"it takes about {_in_units(needed())}, and "
        raise OSError(
            f"{what} could not be written to {folder}: {size}{_in_units(free)} are free there, or a quota or limit "
            f"is met; {kept}. Make room (--save_total_limit 1 keeps one checkpoint) and --resume_from_checkpoint true"
        ) from error


def _is_want_of_room(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    # safetensors and torch.save raise errors of their own, with the system's in their text or not at all
    system_errors = [os.strerror(number) for number in NO_ROOM]
    return any(text in str(error) for text in [*system_errors, "PytorchStreamWriter", "inline_container.cc"])


def _in_units(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint, by the names of transformers' `TrainerState`."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return state
