"""Time of alternating decoding of a mixture, as a part of joint decoding's and of the policy's alone.

    python benchmarks/decoding.py [--rounds 3] [--device cuda] [--output benchmarks/results/decoding.md]

The policy is a Qwen2 model with random weights; the anchor is its copy with noise of `--noise` times each weight's
standard deviation, which sets the acceptance. Without EOS every way samples the same number of tokens; the ways take
turns (A B C C B A …). The table shows medians over the rounds of the ratios within each round.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from logitmix import LogitMixForCausalLM
from logitmix.mixture.alternating import AlternatingStatistics, alternating_completions


def build(args: argparse.Namespace) -> LogitMixForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128, max_position_embeddings=1024, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    policy = Qwen2ForCausalLM(config).to(args.device).eval()
    anchor = copy.deepcopy(policy)
    for p in anchor.parameters():
        if p.dim() > 1:
            p.data += args.noise * p.data.std() * torch.randn_like(p)
    return LogitMixForCausalLM.from_members(policy, anchor, alpha=0.5)


def seconds(args: argparse.Namespace, decode: Callable[[], Any]) -> tuple[float, Any]:
    def synchronize() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    result = decode()
    synchronize()
    return time.perf_counter() - start, result


def generate(model: PreTrainedModel, prompts: list[list[int]], settings: dict[str, Any]) -> None:
    ids = torch.tensor(prompts, device=model.device)
    config = GenerationConfig(**settings, min_new_tokens=settings["max_new_tokens"], pad_token_id=0)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def measure(args: argparse.Namespace, model: LogitMixForCausalLM, batch: int) -> str:
    """The row of the table for `batch` sequences."""
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": args.tokens}
    prompts = torch.randint(1, args.vocab_size, (batch, args.prompt_tokens)).tolist()
    ways: dict[str, Callable[[], Any]] = {
        "joint": lambda: generate(model, prompts, settings),
        "alternating": lambda: alternating_completions(model, prompts, settings).statistics,
        "policy": lambda: generate(model.policy, prompts, settings),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    total = AlternatingStatistics()
    for number in range(args.rounds + 1):
        for way in sorted(ways, reverse=number % 2 == 1):  # so that none always runs first
            elapsed, result = seconds(args, ways[way])
            if number > 0:  # the first round warms up
                times[way].append(elapsed)
                if way == "alternating":
                    total = add(total, result)

    def ratio(other: str) -> str:
        ratios = [a / b for a, b in zip(times["alternating"], times[other], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    excess = total.passes_per_token - (2 - total.acceptance)
    return (
        f"| {batch} | {total.acceptance:.3f} | {total.passes_per_token:.3f} | {excess:+.3f} | {ratio('joint')} "
        f"| {ratio('policy')} |"
    )


def add(one: AlternatingStatistics, other: AlternatingStatistics) -> AlternatingStatistics:
    def pairs(field: str) -> list[int]:
        return [a + b for a, b in zip(getattr(one, field), getattr(other, field), strict=True)]

    return AlternatingStatistics(
        one.tokens + other.tokens, one.passes + other.passes, pairs("drafted"), pairs("accepted")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args)
    rows = [measure(args, model, batch) for batch in args.batches]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, {args.threads} thread(s)"
    lines = [
        "# Alternating decoding",
        "",
        f"`python benchmarks/decoding.py --rounds {args.rounds} --noise {args.noise} --tokens {args.tokens} "
        f"--layers {args.layers}`: two "
        f"Qwen2 members of width {args.hidden_size}, {args.layers} layers and vocabulary {args.vocab_size}, "
        f"alpha 0.5, temperature 1, prompts of {args.prompt_tokens} tokens. "
        "Ratios of times: median (least to greatest).",
        "",
        "| sequences | acceptance a | passes a token | minus (2 - a) | alternating / joint "
        "| alternating / policy alone |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"{date.today()}, {device}, torch {version('torch')}, transformers {version('transformers')}.",
        "",
    ]
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(lines))


def processor() -> str:
    """The processor's name on Linux, elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.machine()


if __name__ == "__main__":
    main()
