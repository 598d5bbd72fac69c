"""The distillation loss compared with others: time and memory of one loss, forward and backward.

    python benchmarks/distill.py [--rounds 3] [--threads 1] [--output benchmarks/results/distill.md]

Each variant computes the mean divergence of a student from its teacher and the gradients by the student's hidden
states and head, at 2,048 tokens, width 256, vocabulary 50,000. The teacher is the mixture of two members at
alpha = 0.5, or for TRL's chunked loss a single model. Times are processor time, of variants that alternate in one
process; the table shows medians of the ratios within each round. Memory is measured in a separate process for each
variant: the peak above the memory before the loss, minus the head's gradient ("workspace").
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from loss_head import libraries_used
from process_memory import peak_memory, reset_peak
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from logitmix.loss_head.distillation import fused_divergence
from logitmix.loss_head.divergence import token_divergence
from logitmix.loss_head.libraries import choose_libraries
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import mix_logits
from logitmix.runs.provenance import processor

TOKENS, WIDTH, VOCABULARY = 2048, 256, 50_000
WEIGHTS = [0.5, 0.5]
DIVERGENCES = {"reverse KL": 1.0, "JSD": 0.5, "forward KL": 0.0}


class Inputs:
    def __init__(self, tokens: int = TOKENS, width: int = WIDTH, vocab: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape).normal_(0, scale, generator=generator)

        self.hidden, self.head = normal(tokens, width), normal(vocab, width, scale=width**-0.5)
        self.members = [normal(tokens, width) for _ in WEIGHTS]
        self.heads = [normal(vocab, width, scale=width**-0.5) for _ in WEIGHTS]
        self.hidden.requires_grad_()
        self.head.requires_grad_()


def fused(x: Inputs, beta: float, scheme: str = "logit") -> Tensor:
    heads = [Head(weight) for weight in x.heads]
    return fused_divergence(x.hidden, Head(x.head), x.members, heads, WEIGHTS, scheme, beta)[0].mean()


def fused_prob(x: Inputs, beta: float) -> Tensor:
    return fused(x, beta, "prob")


def naive(x: Inputs, beta: float) -> Tensor:
    with torch.no_grad():
        members = [h @ weight.T for h, weight in zip(x.members, x.heads, strict=True)]
        teacher = mix_logits(members, WEIGHTS)
        del members
    return token_divergence(x.hidden @ x.head.T, teacher, beta)[0].mean()


def trl_single(x: Inputs, beta: float) -> Tensor:
    return ChunkedDivergenceFunction.apply(x.hidden, x.head, None, x.members[0], x.heads[0], None, beta)[0].mean()


VARIANTS = {
    "naive": ("naive, whole logits", naive),
    "trl": ("TRL's chunked loss, a single model as the teacher", trl_single),
    "fused": ("**logitmix**", fused),
    "prob": ("logitmix, scheme prob", fused_prob),
}
# baseline, largest ratio of times, largest ratio of workspaces
BARS = (("naive", 0.6, 0.1), ("trl", 1.3, 1.0))


def step(x: Inputs, name: str, beta: float) -> float:
    """Seconds of processor time of one loss, forward and backward."""
    x.hidden.grad = x.head.grad = None
    start = time.process_time()
    VARIANTS[name][1](x, beta).backward()
    return time.process_time() - start


def measure_memory(name: str, beta: float) -> int:
    step(Inputs(256, 16, 64), name, beta)  # allocate the libraries' buffers
    x = Inputs()
    choose_libraries(VOCABULARY, WIDTH)  # once in a process, so not part of a loss
    reset_peak("cpu")
    before = peak_memory("cpu")
    step(x, name, beta)
    return peak_memory("cpu") - before - x.head.numel() * 4


def memory_of(name: str, beta: float, threads: int) -> int:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory_of", f"{name}@{beta}"]
    # makes glibc return freed memory at once, so that the peak is of memory in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(json.loads(done.stdout))


def check() -> None:
    """Check that the variants of one mixture compute the same loss and gradient."""
    x = Inputs(256, 32, 1000)
    for beta in DIVERGENCES.values():
        gradients = {}
        for name in ("naive", "fused"):
            step(x, name, beta)
            gradients[name] = x.head.grad
        error = (gradients["fused"] - gradients["naive"]).abs().max()
        assert error <= 1e-4 * gradients["naive"].abs().max(), beta


def report(times: dict, memory: dict, args: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("logitmix", "torch", "trl", "transformers"))
    flags = ["python", "benchmarks/distill.py", *args.flags]
    lines = [
        "# The distillation loss: time and memory of one loss, forward and backward",
        "",
        f"`{' '.join(flags)}`, {date.today()}, {processor()['name']}, threads: {args.threads}, float32; {packages}.",
        f"{TOKENS:,} tokens, width {WIDTH}, vocabulary {VOCABULARY:,}. Medians of {args.rounds} rounds of alternating "
        "variants; seconds of processor time. Workspace: a process's peak above inputs and the head's gradient.",
        "",
        libraries_used(WIDTH, VOCABULARY),
        "",
        "| divergence | variant | seconds | workspace, MB | time of logitmix / its | at most "
        "| workspace of logitmix / its | at most | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, beta in DIVERGENCES.items():
        rounds, space = times[beta], memory[beta]
        for name, (title, _) in VARIANTS.items():
            seconds = statistics.median(r[name] for r in rounds)
            ratio, of_space = statistics.median(r["fused"] / r[name] for r in rounds), space["fused"] / space[name]
            time_bar, space_bar = next(((t, s) for n, t, s in BARS if n == name), (None, None))
            verdict = ""
            if time_bar is not None:
                verdict = "met" if ratio <= time_bar and of_space <= space_bar else "**missed**"
            bars = ["" if bar is None else f"{bar:g}" for bar in (time_bar, space_bar)]
            lines.append(
                f"| {label} | {title} | {seconds:.2f} | {space[name] / 1e6:.0f} | {ratio:.2f} | {bars[0]} "
                f"| {of_space:.3f} | {bars[1]} | {verdict} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.flags = sys.argv[1:]
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, beta = args.memory_of.split("@")
        print(json.dumps(measure_memory(name, float(beta))))
        return
    check()
    times, memory = {}, {}
    for beta in DIVERGENCES.values():
        memory[beta] = {name: memory_of(name, beta, args.threads) for name in VARIANTS}
        x = Inputs()
        rounds = [{name: step(x, name, beta) for name in VARIANTS} for _ in range(args.rounds + 1)]
        times[beta] = rounds[1:]  # the first warms up
        print(f"beta {beta}: {times[beta]} {memory[beta]}", file=sys.stderr, flush=True)
    text = report(times, memory, args)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
