"""What a run records of its origin: versions, hardware, git commit, and fingerprints of the data."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("logitmix", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "safetensors"),
    *("numpy", "mpmath"),
)


def provenance() -> dict[str, Any]:
    """Versions of Python and packages, platform, processor, devices, and the git commit of the working directory."""
    import torch  # commands that only read runs need none of it

    return {
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git_commit(),
    }


def processor() -> dict[str, Any]:
    """The CPU's `name`, if the system reports it, and the `count` of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": names[0] if names else platform.processor() or platform.machine(), "count": count}


def git_commit() -> dict[str, Any] | None:
    """The `commit` checked out in the working directory, and whether tracked files differ from it (`dirty`).

    None outside a git repository, and if git is not installed or does not answer.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def fingerprint(rows: Iterable[Any]) -> dict[str, Any]:
    """The number of rows (mappings or dataclasses) and the SHA-256 of them as JSON lines with sorted keys.

    Equal rows in the same order have the same fingerprint in every process.
    """
    digest, count = hashlib.sha256(), 0
    for row in rows:
        fields: Mapping[str, Any] = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}
