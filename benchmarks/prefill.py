"""Prefill of a mixture with a frozen bfloat16 anchor, compared with both members in plain transformers.

    python benchmarks/prefill.py [--output benchmarks/results/prefill.md]

Both run every member on the same prompts and keep the KV caches and the logits of the last token. The two alternate in
one process, whose own seconds count on a CPU. Memory is the most that a process of its own held, weights and libraries
included. The members have random weights in the shape of SmolLM2-135M.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from process_memory import peak_memory
from transformers import LlamaConfig, LlamaForCausalLM

from logitmix import LogitMixForCausalLM
from logitmix.runs.provenance import processor

KINDS = ("plain", "mixture")
BARS = {"seconds": 1.1, "peak_gb": 1.2}


def member(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()


def prefill(kind: str, args: argparse.Namespace) -> Callable[[], Any]:
    """A function that runs the prompts through both members."""
    ids = torch.randint(49152, (args.prompts, args.length), generator=torch.Generator().manual_seed(0)).to(args.device)
    ids = ids.repeat_interleave(args.group, dim=0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1, "use_cache": True}
    members = [member(args, seed) for seed in (0, 1)]
    if kind == "mixture":
        mixture = LogitMixForCausalLM.from_members(*members)
        return lambda: mixture(**inputs)
    return lambda: [model(**inputs) for model in members]


def seconds(run: Callable[[], Any], device: str) -> float:
    """On a CPU, seconds of this process, whatever else the machine does."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def measure_times(args: argparse.Namespace) -> dict[str, list[float]]:
    runs = {kind: prefill(kind, args) for kind in KINDS}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(args.rounds):
        for kind in KINDS if i % 2 else KINDS[::-1]:
            times[kind].append(seconds(runs[kind], args.device))
    return times


def measure_peak(kind: str, args: argparse.Namespace) -> float:
    """In a process of its own."""
    command = [sys.executable, __file__, "--peak_of", kind]
    for name in ("device", "dtype", "layers", "prompts", "length", "group", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(printed.splitlines()[-1]))


def table(args: argparse.Namespace) -> str:
    times = measure_times(args)
    peaks = {kind: measure_peak(kind, args) for kind in KINDS}
    ratios = [b / a for a, b in zip(times["plain"], times["mixture"], strict=True)]
    ratio, memory = statistics.median(ratios), peaks["mixture"] / peaks["plain"]
    medians = {kind: statistics.median(times[kind]) for kind in KINDS}
    where = processor()["name"] if args.device == "cpu" else torch.cuda.get_device_name()
    unit = "CPU seconds" if args.device == "cpu" else "seconds"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"""# Prefill

`python benchmarks/prefill.py --layers {args.layers} --rounds {args.rounds} --prompts {args.prompts} \
--group {args.group}`:
{args.prompts} prompts of {args.length} tokens, {args.group} rows each, two members of SmolLM2-135M's shape,
{args.dtype}, threads: {args.threads}, {where}.

| | both members in plain transformers | mixture | ratio | bar |
|---|---|---|---|---|
| {unit} | {medians["plain"]:.2f} | {medians["mixture"]:.2f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) \
| {BARS["seconds"]} |
| peak memory, GB | {peaks["plain"]:.2f} | {peaks["mixture"]:.2f} | {memory:.2f} | {BARS["peak_gb"]} |

Medians over {args.rounds} rounds; the ratio of times is within a round, median and range.

{date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--length", type=int, default=55)
    parser.add_argument("--group", type=int, default=1, help="rows with each prompt, as for a group of rollouts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        if args.peak_of is not None:
            prefill(args.peak_of, args)()
            print(json.dumps(peak_memory(args.device.partition(":")[0]) / 1e9))
            return
        text = table(args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
