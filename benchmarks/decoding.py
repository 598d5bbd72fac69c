"""Time of the ways to decode a mixture of two members: joint, alternating, and auto, which chooses between them.

    python benchmarks/decoding.py [--policy FOLDER [--anchor FOLDER]] [--device cuda] [--output FILE]

Without `--policy` both members are Qwen2 models of 135M parameters with random weights; without `--anchor` the
anchor is the policy with noise of `--noise` times each weight's standard deviation, which sets the acceptance rate.
End tokens are off, so that every way samples equally many tokens; the ways take turns (A B C C B A …). The table
shows medians over the rounds of the ratios within each round.
"""

import argparse
import copy
import statistics
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from logitmix import LogitMixForCausalLM
from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.runs.provenance import processor

# of a mixture at a = 0.8, and of identical members
BARS = {"alternating / joint": {1: 0.72, 4: 0.86}, "auto / better": dict.fromkeys((1, 4, 16, 64), 1.03)}
IDENTICAL_BAR, EXCESS_BAR = 1.25, 0.03


def build_members(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    if args.policy is None:
        config = Qwen2Config(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, initializer_range=0.05, tie_word_embeddings=True,
        )  # fmt: skip
        policy: PreTrainedModel = Qwen2ForCausalLM(config)
    else:
        policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype=args.dtype)
    policy = policy.to(args.device, getattr(torch, args.dtype)).eval()
    if args.anchor is not None:
        anchor = AutoModelForCausalLM.from_pretrained(args.anchor, dtype=args.dtype).to(args.device).eval()
    else:
        anchor = copy.deepcopy(policy)
        for p in anchor.parameters():
            if p.dim() > 1:
                p.data += args.noise * p.data.std() * torch.randn_like(p)
    for member in (policy, anchor):
        member.generation_config.eos_token_id = None
    return policy, anchor


def decode(model: PreTrainedModel, prompts: torch.Tensor, tokens: int, **kwargs: str) -> tuple[float, object]:
    """Seconds, and the statistics of decoding, if it has them."""
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "pad_token_id": 0}
    if prompts.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), **settings, return_dict_in_generate=True, **kwargs
    )
    if prompts.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, getattr(output, "statistics", None)


class Measurement:
    """Times of ways that take turns, and the statistics of each."""

    def __init__(self, ways: dict[str, tuple[PreTrainedModel, dict[str, str]]]) -> None:
        self.ways, self.times = ways, {way: [] for way in ways}
        self.statistics = {way: DecodingStatistics() for way in ways}

    def run(self, prompts: torch.Tensor, args: argparse.Namespace) -> None:
        for number in range(args.rounds + 1):
            for way in sorted(self.ways, reverse=number % 2 == 1):  # so that none always runs first
                model, kwargs = self.ways[way]
                torch.manual_seed(number)
                seconds, counted = decode(model, prompts, args.tokens if number else 4, **kwargs)
                if number > 0:  # the first round warms up
                    self.times[way].append(seconds)
                    if counted is not None:
                        self.statistics[way].add(counted)

    def ratio(self, one: str, *others: str) -> tuple[float, str]:
        """The median of one's time divided by that of the fastest other, and the same as text with its range."""
        best = min(others, key=lambda way: statistics.median(self.times[way]))
        ratios = [a / b for a, b in zip(self.times[one], self.times[best], strict=True)]
        median = statistics.median(ratios)
        return median, f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def with_bar(value: float, text: str, bar: float | None) -> str:
    return text if bar is None else f"{text}, bar {bar:g}{'' if value <= bar else ' missed'}"


def row(args: argparse.Namespace, model: LogitMixForCausalLM, batch: int) -> str:
    """Measure all ways at a number of sequences; print the table's row, and return it."""
    prompts = torch.randint(1, model.config.vocab_size, (batch, args.prompt_tokens), device=args.device)
    ways = {way: (model, {"decoding": way}) for way in ("joint", "alternating", "auto")}
    measured = Measurement(ways | {"policy": (model.policy, {})})
    measured.run(prompts, args)
    counted, auto = measured.statistics["alternating"], measured.statistics["auto"]
    excess = counted.passes_per_token - (2 - counted.acceptance)
    cells = [
        str(batch),
        f"{counted.acceptance:.3f}",
        f"{counted.passes_per_token:.3f}",
        with_bar(excess, f"{excess:+.3f}", EXCESS_BAR),
        with_bar(*measured.ratio("alternating", "joint"), BARS["alternating / joint"].get(batch)),
        with_bar(*measured.ratio("auto", "joint", "alternating"), BARS["auto / better"].get(batch)),
        f"{auto.passes_per_token:.2f}" if auto.tokens else "joint",
        measured.ratio("alternating", "policy")[1],
        measured.ratio("joint", "policy")[1],
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    return f"| {' | '.join(cells)} |"


def identical(args: argparse.Namespace, policy: PreTrainedModel) -> str:
    """The sentence on a policy and its copy, which accept every draft."""
    model = LogitMixForCausalLM.from_members(policy, copy.deepcopy(policy), alpha=0.5)
    measured = Measurement({"alternating": (model, {"decoding": "alternating"}), "policy": (policy, {})})
    measured.run(torch.randint(1, model.config.vocab_size, (1, args.prompt_tokens), device=args.device), args)
    value, text = measured.ratio("alternating", "policy")
    return f"Identical members, 1 sequence, alternating / one model alone: {with_bar(value, text, IDENTICAL_BAR)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy")
    parser.add_argument("--anchor")
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, anchor = build_members(args)
    same = identical(args, policy)
    model = LogitMixForCausalLM.from_members(policy, anchor, alpha=args.alpha)
    rows = [row(args, model, batch) for batch in args.batches]
    text = report(args, sum(p.numel() for p in policy.parameters()) / 1e6, rows, same)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


def report(args: argparse.Namespace, millions: float, rows: list[str], same: str) -> str:
    on_cpu = f"{processor()['name']}, {args.threads} threads"
    device = torch.cuda.get_device_name() if args.device == "cuda" else on_cpu
    return "\n".join([
        "# Decoding a mixture of two members",
        "",
        f"`python benchmarks/decoding.py`: {'random weights' if args.policy is None else 'a real model'} of "
        f"{millions:.0f}M parameters and {'its noisy copy' if args.anchor is None else 'its anchor'} in {args.dtype}, "
        f"alpha {args.alpha:g}, temperature 1, {args.tokens} tokens after prompts of {args.prompt_tokens}, "
        f"{args.rounds} rounds. Ratios of times: median (least to greatest).",
        "",
        "| sequences | acceptance a | passes a token | minus (2 - a) | alternating / joint "
        "| auto / the better of both | passes of auto | alternating / policy alone | joint / policy alone |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        same,
        "",
        f"{date.today()}, {device}, torch {version('torch')}, transformers {version('transformers')}.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
