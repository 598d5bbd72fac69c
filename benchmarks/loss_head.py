"""The fused loss head compared with others: time and memory of one loss, forward and backward.

    python benchmarks/loss_head.py [--shapes A B] [--rounds 3] [--output benchmarks/results/loss_head_amd.md]
    python benchmarks/loss_head.py --device cuda --output benchmarks/results/loss_head_cuda.md

Each variant computes the loss of eq. 6 from hidden states, and the gradients by them and by the head, for the mixture
of two members at alpha = 0.5 or for a single policy. "Concatenated" variants are heads for one model, given the
concatenated hidden states and heads of both members, whose product is the mixture's logits. Variants alternate in one
process (A B C A B C ...); the table shows medians of the ratios within each round. Memory is measured in a separate
process for each variant: the peak above the memory before the loss, minus the head's gradient ("workspace").
On a CPU, ratios depend on the vendor: each has a table of its own, which names the processor and the library that
the loss head chose for each product (`logitmix/loss_head/libraries.py`).

Liger's rows require `pip install --no-deps liger-kernel==0.8.5`, and are left out without it.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from logitmix.loss_head import clipped_coefficients, fused_log_probs
from logitmix.loss_head.libraries import choose_libraries, measure
from logitmix.mixture.head import Head
from logitmix.mixture.logprobs import log_probs_and_entropy
from logitmix.mixture.mixing import mix_logits
from logitmix.runs.provenance import processor

# tokens, width, vocabulary
SHAPES = {
    "cpu": {"A": (2048, 256, 50_000), "B": (1024, 896, 151_936)},
    "cuda": {f"{n >> 10}k, D {d}": (n, d, 151_936) for d in (1536, 2048, 3584) for n in (1 << 14, 1 << 16)},
}
SEQUENCE = 512  # tokens of a completion, the paper's limit; Liger's head processes one at a time
BETA = 0.01


class Inputs:
    def __init__(self, tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype).normal_(0, scale, generator=generator)

        self.policy, self.anchor = normal(tokens, width).requires_grad_(), normal(tokens, width)
        self.policy_head = normal(vocab, width, scale=width**-0.5).requires_grad_()
        self.anchor_head = normal(vocab, width, scale=width**-0.5)
        self.targets = torch.randint(vocab, (tokens,), device=device, generator=generator)
        self.advantages = torch.randn(tokens, device=device, generator=generator)
        self.both: Tensor | None = None

    def concatenate(self) -> None:
        """Concatenate the members: one head whose product is the mixture's logits."""
        self.both = torch.cat([0.5 * self.policy.detach(), 0.5 * self.anchor], 1).requires_grad_()
        self.both_heads = torch.cat([self.policy_head.detach(), self.anchor_head], 1).requires_grad_()

    def forget_gradients(self) -> None:
        for x in (self.policy, self.policy_head, self.both, getattr(self, "both_heads", None)):
            if x is not None:
                x.grad = None

    def loss(self, log_probs: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The loss of the first update after a rollout, whose ratio is 1; with a KL to the `anchor`'s log-probs."""
        loss = -(log_probs - log_probs.detach()).exp() * self.advantages
        if anchor is not None:
            gap = anchor - log_probs
            loss = loss + BETA * (gap.exp() - gap - 1)
        return loss.mean()


def naive(x: Inputs) -> Tensor:
    policy, anchor = x.policy @ x.policy_head.T, x.anchor @ x.anchor_head.T  # as the members' forwards return them
    mixed = 0.5 * policy + 0.5 * anchor
    return x.loss(mixed.float().log_softmax(-1).gather(-1, x.targets.unsqueeze(-1)).squeeze(-1))


def trl_concatenated(x: Inputs) -> Tensor:
    return x.loss(trl(x.both, x.both_heads, x.targets))


def trl_single(x: Inputs) -> Tensor:
    return x.loss(trl(x.policy, x.policy_head, x.targets))


def trl(hidden: Tensor | None, head: Tensor, targets: Tensor) -> Tensor:
    log_probs: Tensor = ChunkedLogProbFunction.apply(
        hidden, head, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )[0]
    return log_probs


def liger_concatenated(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    assert x.both is not None
    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", temperature=1.0)
    shape = (-1, SEQUENCE)
    mask = torch.ones_like(x.targets).view(shape)
    loss: Tensor = head(
        x.both.view(*shape, x.both.shape[-1]),
        x.both_heads,
        x.targets.view(shape),
        mask,
        x.advantages.view(shape)[:, 0],
    )[0]
    return loss


def fused(x: Inputs) -> Tensor:
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    log_probs, _ = fused_log_probs(
        [x.policy, x.anchor], heads, [0.5, 0.5], x.targets,
        coefficients=lambda log_probs, tokens: clipped_coefficients(log_probs, x.advantages[tokens]),
    )  # fmt: skip
    return x.loss(log_probs)


def fused_again(x: Inputs) -> Tensor:
    """Without coefficients, as for a loss of whole sequences: the backward pass recomputes the chunks."""
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    return x.loss(fused_log_probs([x.policy, x.anchor], heads, [0.5, 0.5], x.targets)[0])


def fused_prob(x: Inputs) -> Tensor:
    heads = [Head(x.policy_head), Head(x.anchor_head)]
    log_probs, _ = fused_log_probs(
        [x.policy, x.anchor], heads, [0.5, 0.5], x.targets, "prob",
        coefficients=lambda log_probs, tokens: clipped_coefficients(log_probs, x.advantages[tokens]),
    )  # fmt: skip
    return x.loss(log_probs)


def fused_single_kl(x: Inputs) -> Tensor:
    """Canonical GRPO with the same head: the anchor's log-probs, then the policy's with the KL to them."""
    with torch.no_grad():
        anchor, _ = fused_log_probs([x.anchor], [Head(x.anchor_head)], [1.0], x.targets)

    def coefficients(log_probs: Tensor, tokens: slice) -> Tensor:
        return clipped_coefficients(log_probs, x.advantages[tokens]) + BETA * (1 - (anchor[tokens] - log_probs).exp())

    log_probs, _ = fused_log_probs([x.policy], [Head(x.policy_head)], [1.0], x.targets, coefficients=coefficients)
    return x.loss(log_probs, anchor)


def fused_shared(x: Inputs) -> Tensor:
    head = Head(x.policy_head.detach())
    return x.loss(fused_log_probs([x.policy, x.anchor], [head, head], [0.5, 0.5], x.targets)[0])


def products(x: Inputs) -> Tensor:
    """Only the four matrix products of two members with a trained head."""
    hidden, head = x.policy.detach(), x.policy_head.detach()
    tokens = len(hidden)
    size = min(tokens, 256 if hidden.device.type == "cpu" else 2048)
    z = hidden.new_empty(size, len(head))
    x.policy.grad, x.policy_head.grad = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        torch.mm(hidden[part], head.T, out=z)
        z.addmm_(x.anchor[part], x.anchor_head.T)
        torch.mm(z, head, out=x.policy.grad[part])
        x.policy_head.grad.addmm_(z.T, hidden[part])
    return torch.zeros(()).requires_grad_()


Variant = Callable[[Inputs], Tensor]
VARIANTS: dict[str, tuple[str, Variant]] = {
    "naive": ("naive mixture", naive),
    "trl": ("TRL's chunked head, concatenated", trl_concatenated),
    "trl_single": ("TRL's chunked head, single policy, beta = 0", trl_single),
    "liger": ("Liger's fused linear GRPO, concatenated", liger_concatenated),
    "fused": ("**logitmix**", fused),
    "single_kl": ("logitmix, single policy with KL", fused_single_kl),
    "shared": ("logitmix, one frozen head of both members", fused_shared),
    "again": ("logitmix, recomputed in the backward pass", fused_again),
    "prob": ("logitmix, scheme prob", fused_prob),
    "products": ("the four matrix products alone, `torch.mm`", products),
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


def available(name: str) -> bool:
    return name != "liger" or importlib.util.find_spec("liger_kernel") is not None


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


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the resident memory


def measure_memory(name: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> int:
    """Workspace of one variant in this process, in bytes."""
    variant = VARIANTS[name][1]
    is_concatenated = name in ("trl", "liger")
    small = Inputs(2 * SEQUENCE, 16, 64, device, dtype)  # allocate the libraries' buffers
    small.concatenate()
    step(small, variant, device)
    x = Inputs(*shape, device, dtype)
    if is_concatenated:
        x.concatenate()
    if device == "cpu":
        choose_libraries(shape[2], shape[1])  # once in a process, so not part of a loss
    reset_peak(device)
    before = peak_bytes(device)
    step(x, variant, device)
    gradient = 0 if name == "shared" else x.policy_head.numel() * x.policy_head.element_size()
    return peak_bytes(device) - before - gradient


def check(x: Inputs) -> None:
    """Check that all variants compute the same loss."""
    found = {}
    for name in ("naive", "trl", "liger", "fused", "again"):
        if available(name):
            x.forget_gradients()
            VARIANTS[name][1](x).backward()
            gradients = [x.both.grad * 0.5, x.both_heads.grad] if name in ("trl", "liger") else None
            found[name] = (
                [g[:, : x.policy.shape[1]] for g in gradients] if gradients else [x.policy.grad, x.policy_head.grad]
            )
    with torch.no_grad():
        z = [x.policy @ x.policy_head.T, x.anchor @ x.anchor_head.T]
        log_probs_and_entropy(mix_logits(z, [0.5, 0.5]), x.targets)
    for name, gradients in found.items():
        if name == "liger":  # it takes one advantage per sequence
            continue
        for gradient, other in zip(found["fused"], gradients, strict=True):
            assert (gradient - other).abs().max() <= 1e-4 * other.abs().max(), name


def measure_times(names: list[str], shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, float]]:
    x = Inputs(*shape, args.device, args.dtype)
    if {"trl", "liger"} & set(names):
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
    bytes_: int = in_process(args, "--memory_of", f"{name}@{shape}", MALLOC_MMAP_THRESHOLD_=str(1 << 18))[0]
    return bytes_


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


def report(
    times: dict[str, list[dict[str, float]]], memory: dict[str, dict[str, int]], args: argparse.Namespace
) -> str:
    device = f"{processor()['name']}, threads: {args.threads}"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    unit = "seconds of processor time" if args.device == "cpu" else "seconds"
    packages = []
    for name in ("logitmix", "torch", "trl", "transformers", "liger-kernel"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    lines = [
        "# The loss head: time and memory of one loss, forward and backward",
        "",
        f"`{' '.join(['python', 'benchmarks/loss_head.py', *args.flags])}`, {date.today()}, {device} "
        f"({platform.machine()}), {str(args.dtype).removeprefix('torch.')}; {', '.join(packages)}.",
        f"Medians of {args.rounds} rounds of alternating variants; {unit}. Workspace: a process's peak above inputs "
        "and the head's gradient.",
        "",
    ]
    for shape, rounds in times.items():
        tokens, width, vocab = SHAPES[args.device][shape]
        lines += [
            f"## {shape}: {tokens:,} tokens, width {width:,}, vocabulary {vocab:,}",
            "",
            "| variant | seconds | workspace, MB | time of logitmix / its | workspace of logitmix / its |",
            "|---|---|---|---|---|",
        ]
        for name in rounds[0]:
            seconds = statistics.median(r[name] for r in rounds)
            space, fused_space = memory[shape][name], memory[shape]["fused"]
            lines.append(
                f"| {VARIANTS[name][0]} | {seconds:.2f} | {space / 1e6:.0f} | {ratio(rounds, 'fused', name):.2f} "
                f"| {fused_space / max(space, 1):.3f} |"
            )
        lines.append("")
        if args.device == "cpu":
            lines += [libraries_used(width, vocab), ""]
    lines += [
        "## Targets",
        "",
        "| | shape | time | at most | workspace | at most | |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, baseline, shapes, time_bar, space_bar in BARS[args.device]:
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
    return "\n".join(lines) + "\n"


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
