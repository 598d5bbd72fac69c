"""The fused loss head compared with others: time and memory of one loss, forward and backward.

    python benchmarks/loss_head.py [--shapes A B] [--rounds 3] [--output benchmarks/results/loss_head_amd.md]
    python benchmarks/loss_head.py --device cuda --output benchmarks/results/loss_head_cuda.md

Each variant (`loss_head_variants.py`) computes the loss of eq. 6 from hidden states, and the gradients by them and by
the head, for the mixture of two members at alpha = 0.5 or for a single policy. "Concatenated" variants are heads for
one model, given the concatenated hidden states and heads of both members, whose product is the mixture's logits.
Variants alternate in one process (A B C A B C ...); the table shows medians of the ratios within each round. Memory is
measured in a separate process for each variant: the peak above the memory before the loss, minus the head's gradient
("workspace").
On a CPU, ratios depend on the vendor: each has a table of its own, which names the processor and the library that
the loss head chose for each product (`logitmix/loss_head/libraries.py`).

Liger's rows require `pip install --no-deps liger-kernel==0.8.5`, and are left out without it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from loss_head_variants import CONCATENATED, SEQUENCE, VARIANTS, Inputs, Variant, available
from process_memory import peak_memory, reset_peak
from torch import Tensor

from logitmix.loss_head.libraries import choose_libraries, measure
from logitmix.runs.provenance import processor

# tokens, width, vocabulary
SHAPES = {
    "cpu": {"A": (2048, 256, 50_000), "B": (1024, 896, 151_936)},
    "cuda": {f"{n >> 10}k, D {d}": (n, d, 151_936) for d in (1536, 2048, 3584) for n in (1 << 14, 1 << 16)},
}
ONLY_AT_A = ("trl", "trl_single", "again", "prob")  # they take minutes at B, which has no bar for them
# variant, baseline, shapes, largest ratio of times, largest ratio of workspaces
BARS = {
    "cpu": [
        ("fused", "naive", "A", 0.55, 1 / 20),
        ("fused", "naive", "B", 0.90, 1 / 20),
        ("fused", "trl_single", "A", 0.38, 1 / 15),
        ("fused", "liger", "AB", 0.50, 1 / 4),
        ("fused", "single_kl", "AB", 1.02, 1.05),
        ("shared", "fused", "AB", 0.60, 1 / 2),
    ],
    "cuda": [("fused", "products", None, 1.20, None), ("fused", "naive", None, None, 1 / 20)],
}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step(x: Inputs, variant: Variant, device: str) -> float:
    """Seconds of one loss, forward and backward: on a CPU of processor time, which other programs do not lengthen."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    x.forget_gradients()
    synchronize(device)
    start = clock()
    loss = variant(x)
    if loss.grad_fn is not None:
        loss.backward()
    synchronize(device)
    return clock() - start


def measure_memory(name: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> int:
    """Workspace of one variant in this process, in bytes."""
    variant = VARIANTS[name][1]
    small = Inputs(2 * SEQUENCE, 16, 64, device, dtype)  # allocate the libraries' buffers
    small.concatenate()
    step(small, variant, device)
    x = Inputs(*shape, device, dtype)
    if name in CONCATENATED:
        x.concatenate()
    if device == "cpu":
        choose_libraries(shape[2], shape[1])  # once in a process, so not part of a loss
    reset_peak(device)
    before = peak_memory(device)
    step(x, variant, device)
    gradient = 0 if name == "shared" else x.policy_head.numel() * x.policy_head.element_size()
    return peak_memory(device) - before - gradient


def gradients(x: Inputs, name: str) -> list[Tensor]:
    """The gradients of a variant by the policy's hidden states and by its head."""
    x.forget_gradients()
    VARIANTS[name][1](x).backward()
    if name not in CONCATENATED:
        return [x.policy.grad, x.policy_head.grad]
    width = x.policy.shape[1]
    return [0.5 * x.both.grad[:, :width], x.both_heads.grad[:, :width]]


def check(x: Inputs) -> None:
    """Check that the variants of one loss have equal gradients. Liger's differs: it takes one advantage a sequence."""
    fused = gradients(x, "fused")
    for name in ("naive", "trl", "again"):
        for gradient, other in zip(fused, gradients(x, name), strict=True):
            assert (gradient - other).abs().max() <= 1e-4 * other.abs().max(), name


def measure_times(names: list[str], shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, float]]:
    x = Inputs(*shape, args.device, args.dtype)
    if not set(names).isdisjoint(CONCATENATED):
        x.concatenate()
    rounds = []
    for i in range(args.rounds + 1):
        seconds = {name: step(x, VARIANTS[name][1], args.device) for name in names}
        print(f"{shape} round {i}: {seconds}", file=sys.stderr, flush=True)
        if i:  # the first warms up
            rounds.append(seconds)
    return rounds


def in_process(args: argparse.Namespace, *flags: str, **environment: str) -> list:
    """The output of this script with `flags` in another process."""
    command = [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads), *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return json.loads(done.stdout)


def memory_of(args: argparse.Namespace, name: str, shape: str) -> int:
    # makes glibc return freed memory at once, so that the peak is of memory in use
    return in_process(args, "--memory_of", f"{name}@{shape}", MALLOC_MMAP_THRESHOLD_=str(1 << 18))[0]


def ratio(rounds: list[dict[str, float]], variant: str, baseline: str) -> float:
    return statistics.median(seconds[variant] / seconds[baseline] for seconds in rounds)


def libraries_used(width: int, vocab: int) -> str:
    """A sentence that names the library of each product, and how much faster oneDNN is."""
    found = []
    for product, library in choose_libraries(vocab, width).items():
        seconds = measure(product, width)
        ratio_of_times = seconds["torch.mm"] / seconds["oneDNN"]
        found.append(f"{product.replace('_', ' ')}, {library} (oneDNN {ratio_of_times:.2f} times as fast)")
    return f"Matrix products: {'; '.join(found)}."


def versions() -> str:
    found = []
    for name in ("logitmix", "torch", "trl", "transformers", "liger-kernel"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def table(shape: str, rounds: list[dict[str, float]], memory: dict[str, int], device: str) -> list[str]:
    """The lines of one shape: time and workspace of each variant, and the ratios of logitmix's to them."""
    tokens, width, vocab = SHAPES[device][shape]
    lines = [
        f"## {shape}: {tokens:,} tokens, width {width:,}, vocabulary {vocab:,}",
        "",
        "| variant | seconds | workspace, MB | time of logitmix / its | workspace of logitmix / its |",
        "|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        seconds = statistics.median(r[name] for r in rounds)
        lines.append(
            f"| {VARIANTS[name][0]} | {seconds:.2f} | {memory[name] / 1e6:.0f} | {ratio(rounds, 'fused', name):.2f} "
            f"| {memory['fused'] / max(memory[name], 1):.3f} |"
        )
    return [*lines, "", *([libraries_used(width, vocab), ""] if device == "cpu" else [])]


def targets(times: dict[str, list[dict[str, float]]], memory: dict[str, dict[str, int]], device: str) -> list[str]:
    """The lines that compare the ratios with their bars."""
    lines = [
        "## Targets",
        "",
        "| | shape | time | at most | workspace | at most | |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, baseline, shapes, time_bar, space_bar in BARS[device]:
        for shape, rounds in times.items():
            if (shapes and shape not in shapes) or baseline not in rounds[0] or variant not in rounds[0]:
                continue
            time_ratio = ratio(rounds, variant, baseline)
            space_ratio = memory[shape][variant] / max(memory[shape][baseline], 1)
            met = (time_bar is None or time_ratio <= time_bar) and (space_bar is None or space_ratio <= space_bar)
            bars = ["-" if bar is None else f"{bar:.3g}" for bar in (time_bar, space_bar)]
            lines.append(
                f"| {' / '.join(VARIANTS[name][0].strip('*') for name in (variant, baseline))} | {shape} "
                f"| {time_ratio:.2f} | {bars[0]} "
                f"| {space_ratio:.3f} | {bars[1]} | {'met' if met else '**missed**'} |"
            )
    return lines


def report(
    times: dict[str, list[dict[str, float]]], memory: dict[str, dict[str, int]], args: argparse.Namespace
) -> str:
    on_cpu = args.device == "cpu"
    device = f"{processor()['name']}, threads: {args.threads}" if on_cpu else torch.cuda.get_device_name()
    lines = [
        "# The loss head: time and memory of one loss, forward and backward",
        "",
        f"`{' '.join(['python', 'benchmarks/loss_head.py', *args.flags])}`, {date.today()}, {device} "
        f"({platform.machine()}), {str(args.dtype).removeprefix('torch.')}; {versions()}.",
        f"Medians of {args.rounds} rounds of alternating variants; seconds{' of processor time' if on_cpu else ''}. "
        "Workspace: a process's peak above inputs and the head's gradient.",
        "",
    ]
    for shape, rounds in times.items():
        lines += table(shape, rounds, memory[shape], args.device)
    return "\n".join([*lines, *targets(times, memory, args.device)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--shapes", nargs="+", help="default: all of the device")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--times_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.flags = sys.argv[1:]
    args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.set_num_threads(args.threads)
    shapes = SHAPES[args.device]
    names = [name for name in args.variants or VARIANTS if available(name)]
    if args.memory_of:
        name, shape = args.memory_of.split("@")
        print(json.dumps([measure_memory(name, shapes[shape], args.device, args.dtype)]))
        return
    if args.times_of:
        print(json.dumps(measure_times(names, shapes[args.times_of], args)))
        return
    small = Inputs(2 * SEQUENCE, 32, 1000, args.device, torch.float32)
    small.concatenate()
    check(small)
    times, memory = {}, {}
    for shape in args.shapes or shapes:
        shape_names = [name for name in names if shape != "B" or args.variants or name not in ONLY_AT_A]
        memory[shape] = {name: memory_of(args, name, shape) for name in shape_names}
        times[shape] = in_process(args, "--times_of", shape, "--rounds", str(args.rounds), "--variants", *shape_names)
    text = report(times, memory, args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
