"""Checkpoints that refer to frozen weights instead of holding them. No torch here: commands look at folders with it.

A run keeps its frozen weights once, in `frozen/` beside its checkpoints, or within the whole model that it saves at
its end. A checkpoint then holds what trains, and `frozen.json`:

    {"store": {"files": {"0f3a….safetensors": 1234}, "run": "/where/it/was", "sha256": {"anchor_0": "…"}},
     "sources": {"anchor_0": {"path": "/models/sft", "sha256": "…", "dtype": "bfloat16"}}}

`store` is where the weights are. Without it (`save_frozen="never"`), or where it is lost, they are read from
`sources`, the folders that the members were loaded from. A fingerprint is the SHA-256 of names, types, shapes and
bytes, however they are divided into files.
"""

import filecmp
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

REFERENCES = "frozen.json"
STORE = "frozen"  # the folder of a run with its frozen weights
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHOWN = 12  # digits of a fingerprint in a message


class Weight(NamedTuple):
    """A weight in a safetensors file: where it is, and what it is."""

    path: Path
    start: int
    end: int
    kind: str


def read_references(checkpoint: Path) -> dict[str, Any] | None:
    """The references of a checkpoint; None if it is whole. Raises `ValueError` if they cannot be read."""
    path = checkpoint / REFERENCES
    if not path.exists():
        return None
    try:
        references: dict[str, Any] = json.loads(path.read_text())
        references["store"], references["sources"].keys()  # both are there
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, so the frozen weights of the checkpoint cannot be found; copy it again, or use "
            "another checkpoint"
        ) from error
    return references


def frozen_files(checkpoint: Path, references: Mapping[str, Any]) -> list[Path] | None:
    """The files that hold a checkpoint's frozen weights; None if they are where the members were loaded from.

    Raises `ValueError` if they are in neither place.
    """
    store, sources = references["store"], references["sources"]
    files = None if store is None else _find_store(checkpoint, store)
    if files is not None:
        return files
    for member in sources if store is None else store["sha256"]:
        found = find_source(checkpoint, sources[member]) if member in sources else None
        if found is None and store is not None:
            raise _missing_store(checkpoint, store)
        if found is None:
            beside, path = os.path.normpath(checkpoint / sources[member]["relative"]), sources[member]["path"]
            raise ValueError(
                f"the checkpoint {checkpoint} was saved without its frozen {member}, which is missing: it is neither "
                f"at {beside}, nor where it was, at {path}; copy it there"
            )
    return None


def _find_store(checkpoint: Path, store: Mapping[str, Any]) -> list[Path] | None:
    """The files of the run that the checkpoint is in, or was saved in; where it has ended, those of its model."""
    parent = checkpoint.parent
    # a checkpoint that a resumed run set aside is one folder deeper
    for run in dict.fromkeys([parent, checkpoint.resolve().parent, parent.parent, Path(store["run"])]):
        files = [run / STORE / name for name in store["files"]]
        if all(path.is_file() for path in files):
            return files
        # a quantised member has a folder of its own, also within the model
        nested = [run / name for name in store["files"] if "/" in name]
        if is_whole(run) and all(path.is_file() for path in nested):
            return weight_files(run) + nested
    return None


def _missing_store(checkpoint: Path, store: Mapping[str, Any]) -> ValueError:
    parent = checkpoint.parent
    missing = next(name for name in store["files"] if not (parent / STORE / name).is_file())
    return ValueError(
        f"the checkpoint {checkpoint} does not hold the frozen weights of {', '.join(store['sha256'])}, but refers to "
        f"{STORE}/{missing}, which is missing: it is neither in {parent}, nor where it was, in {store['run']}; copy "
        f"the folder {STORE}, or the model, of that run into {parent}"
    )


def find_source(checkpoint: Path, source: Mapping[str, Any]) -> str | None:
    """The folder or hub id that a frozen member was loaded from; None if the folder is not there any more."""
    path = str(source["path"])
    if source["relative"] is None:
        return path
    folders = (os.path.normpath(checkpoint / source["relative"]), path)
    return next((folder for folder in folders if os.path.isdir(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all weights of a model."""
    has_weights = (folder / WHOLE).is_file() or (folder / INDEX).is_file()
    return has_weights and not (folder / REFERENCES).exists()


def store_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint's frozen weights cannot be read, judging by names and sizes; None if they can.

    Raises `ValueError` where they are missing.
    """
    references = read_references(checkpoint)
    files = None if references is None else frozen_files(checkpoint, references)
    sizes = {} if references is None or references["store"] is None else references["store"]["files"]
    for path in files or ():
        name = next((name for name in sizes if path.parts[-1 - name.count("/") :] == tuple(name.split("/"))), None)
        if name is not None and path.stat().st_size != sizes[name]:
            return f"its {STORE}/{name} has {path.stat().st_size} of {sizes[name]} bytes"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint's own weights."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return [folder / WHOLE]
    return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]


def read_header(path: Path) -> dict[str, Weight]:
    """The weights in a safetensors file, by their names."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: Weight(
            path,
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
            f"{entry['dtype']} {entry['shape']}",
        )
        for name, entry in header.items()
    }


def digests(weights: Mapping[str, Weight]) -> dict[str, str]:
    """The SHA-256 of the bytes of each weight."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(weights, pool.map(_digest, weights.values()), strict=True))


def fingerprints(
    weights: Mapping[str, Weight],
    member_of: Callable[[str], str] = lambda name: "",
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The fingerprint of each member's weights, of which the `digests` may be `known`."""
    found = digests(weights) if known is None else known
    members: dict[str, Any] = {}
    for name in sorted(weights):
        lines = members.setdefault(member_of(name), hashlib.sha256())
        lines.update(f"{name} {weights[name].kind} {found[name]}\n".encode())
    return {member: lines.hexdigest() for member, lines in members.items()}


def _digest(weight: Weight) -> str:
    if weight.start == weight.end:
        return hashlib.sha256().hexdigest()
    with (
        weight.path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as whole,
        whole[weight.start : weight.end] as view,
    ):
        return hashlib.sha256(view).hexdigest()


def source_fingerprint(folders: Iterable[Path]) -> str:
    """One fingerprint of the weights in a model's folder; of an adapter, in its own folder and its base's."""
    total = hashlib.sha256()
    for folder in folders:
        files = list(_model_files(folder))
        tensors = {
            name: weight
            for path in files
            if path.suffix == ".safetensors"
            for name, weight in read_header(path).items()
        }
        total.update(fingerprints(tensors).get("", "").encode())
        for path in files:
            if path.suffix != ".safetensors":
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _model_files(folder: Path) -> Iterator[Path]:
    """The files that a model or an adapter is loaded from: safetensors, or else PyTorch's."""
    for stem in ("adapter_model", "model", "pytorch_model"):
        for suffix in (".safetensors", ".bin"):
            found = sorted(folder.glob(f"{stem}{suffix}")) or sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
            if found:
                yield from found
                return


def same_model(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, in equal files, with the same configuration."""
    names = [path.name for path in _model_files(folder)]
    if not names or names != [path.name for path in _model_files(other)]:
        return False
    if _configuration(folder) != _configuration(other):
        return False
    return all(filecmp.cmp(folder / name, other / name, shallow=False) for name in names)  # up to a difference


def _configuration(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def validate_fingerprints(found: Mapping[str, str], saved: Mapping[str, str], where: str) -> None:
    """Raise `ValueError`, with its name, for a frozen member whose weights are not those that the run saved."""
    for member, expected in saved.items():
        now = found.get(member, "missing")
        if now != expected:
            raise ValueError(
                f"the frozen weights of {member} in {where} are not those that the run saved: their SHA-256 is "
                f"{now[:_SHOWN]}, and was {expected[:_SHOWN]}; put the original back, or use a whole checkpoint"
            )


def validate_source(member: str, path: str, found: str | None, expected: str) -> None:
    """Raise `ValueError` if the folder that a frozen member is loaded from has changed since the run began."""
    now = found or "missing"
    if now != expected:
        raise ValueError(
            f"the frozen {member} at {path!r} has changed since the run began: the SHA-256 of its weights is "
            f"{now[:_SHOWN]}, and was {expected[:_SHOWN]}; put the original back, or start a new run"
        )
