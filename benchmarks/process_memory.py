"""The memory of a process, for the benchmarks that measure it: on a GPU, that of torch's allocations."""

import gc
import resource
from pathlib import Path

import torch


def memory_now(device: str) -> int:
    """Bytes that are resident, or allocated on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status()["VmRSS"]


def peak_memory(device: str) -> int:
    """The most bytes that were resident, or allocated on the GPU, since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status().get("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the resident memory


def _status() -> dict[str, int]:
    """The sizes in Linux's `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
