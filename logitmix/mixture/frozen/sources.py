"""The folders and hub ids that frozen members were loaded from, and whether their weights have changed since."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel

from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.base import MixtureBase
from logitmix.mixture.configuration import NO_ADAPTER, LogitMixConfig
from logitmix.mixture.dtypes import name_of
from logitmix.mixture.frozen.references import find_source, source_fingerprint, validate_source


def frozen_sources(config: LogitMixConfig, sources: Sequence[Any]) -> dict[str, str]:
    """The folder or hub id of each frozen member, of those that the mixture was built from.

    A policy with an adapter has its base here; an anchor that is this base has nothing of its own.
    """
    found = {}
    for name, source in zip(config.members, sources, strict=True):
        adapter = config.adapters.get(name)
        if isinstance(source, PreTrainedModel) or adapter == NO_ADAPTER or (name == "policy" and adapter is None):
            continue
        path = str(source)
        saved = read_adapter_config(path) if name == "policy" else None
        path = path if saved is None else str(saved.base_model_name_or_path)
        found[name] = os.path.abspath(path) if os.path.isdir(path) else path
    return found


def describe_sources(mixture: MixtureBase, paths: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Where the frozen members were loaded from, `paths`, for `frozen.json`: with fingerprints and dtypes.

    Members that were passed in memory, and hub ids without files on this machine, are left out.
    """
    sources = {}
    for name, source in paths.items():
        fingerprint = fingerprint_of(source)
        if fingerprint is not None:
            dtype = name_of(getattr(mixture, mixture.config.model_of(name)).dtype)
            sources[name] = {"path": source, "sha256": fingerprint, "dtype": dtype}
    return sources


def relative_to(folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sources with their paths from `folder` too, None for hub ids: both may move together."""
    return {
        name: {**saved, "relative": os.path.relpath(saved["path"], folder) if os.path.isdir(saved["path"]) else None}
        for name, saved in sources.items()
    }


def without_source(mixture: MixtureBase) -> list[str]:
    """The frozen members that `describe_sources` leaves out."""
    config = mixture.config
    frozen = [name for name in config.members[1:] if config.adapters.get(name) != NO_ADAPTER]
    frozen += ["policy"] if "policy" in config.adapters else []
    return [name for name in frozen if name not in mixture.sources or folders_of(mixture.sources[name]) is None]


def fingerprint_of(source: str) -> str | None:
    """The fingerprint of the weights at a folder or hub id; of an adapter, with those of its base.

    None for a hub id without files on this machine.
    """
    folders = folders_of(source)
    return None if folders is None else source_fingerprint(folders)


def folders_of(source: str) -> list[Path] | None:
    """The folders of a model, or of an adapter and its base; None for a hub id without files on this machine."""
    folders = []
    while True:
        try:
            folder = source if os.path.isdir(source) else snapshot_download(source, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        folders.append(Path(folder))
        adapter = read_adapter_config(source)
        if adapter is None:
            return folders
        source = str(adapter.base_model_name_or_path)


def validate_sources(mixture: MixtureBase, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` if a frozen member was loaded from other weights than when the run began."""
    for name, saved in sources.items():
        source = mixture.sources.get(name)
        if source is not None:
            validate_source(name, source, fingerprint_of(source), saved["sha256"])


def unchanged_source(checkpoint: Path, name: str, saved: Mapping[str, Any]) -> str:
    """The folder or hub id of a frozen member. Raises `ValueError` if it has changed."""
    path = find_source(checkpoint, saved)
    assert path is not None, "frozen_files has found it"
    validate_source(name, path, fingerprint_of(path), saved["sha256"])
    return path
