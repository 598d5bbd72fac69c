"""Cost of a sweep over alpha: eleven alphas in one batch, the same sequences at one alpha, and eleven separate runs.

    python benchmarks/sweep.py [--rounds 3] [--output benchmarks/results/sweep.md]

Policy and anchor are small Qwen2 models with random weights, saved to a temporary folder. Every sequence is decoded to
the same length, so all ways generate the same number of tokens. A separate run is a process that starts Python, loads
both members and decodes one alpha; these run only in the first round. The other ways alternate (A B C A B C …). The
table shows medians, and the ratios within each round.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from logitmix import LogitMixForCausalLM
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.paper.tiny_model import character_tokenizer
from logitmix.tasks import Arithmetic

ALPHAS = [i / 10 for i in range(11)]


def decode(folder: Path, alphas: list[float], problems: int, tokens: int) -> float:
    """Load the members; return the seconds to decode the problems at every alpha in one batch."""
    model = LogitMixForCausalLM.from_members(str(folder / "policy"), str(folder / "anchor")).eval()
    return decode_with(model, alphas, problems, tokens)


def decode_with(model: LogitMixForCausalLM, alphas: list[float], problems: int, tokens: int) -> float:
    task = Arithmetic()
    tokenizer = character_tokenizer(task.alphabet)
    prompts = [tokenizer(task.prompt(problem))["input_ids"] for problem in task.problems("test", problems)]
    settings = GREEDY | {"max_new_tokens": tokens, "min_new_tokens": tokens}
    weights = [alpha for alpha in alphas for _ in prompts]
    start = time.perf_counter()
    completions = generate_completions(model, tokenizer, prompts * len(alphas), settings, alpha=weights)
    assert all(len(ids) == tokens for ids in completions)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--vocab_size", type=int, default=33)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for a separate run
    parser.add_argument("--alpha", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.folder is not None:
        decode(args.folder, [args.alpha], args.problems, args.tokens)
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, name in enumerate(("policy", "anchor")):
            torch.manual_seed(seed)
            config = Qwen2Config(
                vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                tie_word_embeddings=True, eos_token_id=0, pad_token_id=1,
            )  # fmt: skip
            Qwen2ForCausalLM(config).save_pretrained(folder / name)
        text = report(measure(folder, args), args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way in each round; of the processes in the first alone."""
    model = LogitMixForCausalLM.from_members(str(folder / "policy"), str(folder / "anchor")).eval()
    decode_with(model, [0.5], args.problems, args.tokens)  # warm up
    sizes = ("--problems", str(args.problems), "--tokens", str(args.tokens))
    seconds: dict[str, list[float]] = {"many": [], "one": [], "loads": [], "processes": []}
    alphas = {"many": ALPHAS, "one": [0.5] * len(ALPHAS)}
    for number in range(args.rounds):
        for way in ("one", "many") if number % 2 else ("many", "one"):  # so that neither always runs second
            seconds[way].append(decode_with(model, alphas[way], args.problems, args.tokens))
        start = time.perf_counter()
        for alpha in ALPHAS:
            decode(folder, [alpha], args.problems, args.tokens)
        seconds["loads"].append(time.perf_counter() - start)
        if number > 0:  # the processes take longest
            continue
        start = time.perf_counter()
        for alpha in ALPHAS:
            run = ("--folder", str(folder), "--alpha", str(alpha))
            subprocess.run([sys.executable, __file__, *sizes, *run], check=True, stderr=subprocess.DEVNULL)
        seconds["processes"].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> str:
    def ratio(way: str) -> str:
        ratios = [many / other for many, other in zip(seconds["many"], seconds[way], strict=False)]
        return f"{statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"

    ways = {
        "many": "eleven alphas, 0 to 1, in one batch",
        "one": "as many sequences, all at alpha 0.5",
        "loads": "eleven times: load both members, decode one alpha",
        "processes": "eleven processes, each for one alpha",
    }
    lines = [
        "# A sweep over alpha",
        "",
        f"`python benchmarks/sweep.py --rounds {args.rounds} --vocab_size {args.vocab_size} --tokens {args.tokens}`: "
        f"{args.problems} problems, {args.tokens} new tokens "
        f"each, two Qwen2 members of width {args.hidden_size} and vocabulary {args.vocab_size}, one thread.",
        "",
        "| | seconds | eleven in one batch cost, of it |",
        "|---|---|---|",
        *(f"| {what} | {statistics.median(seconds[way]):.2f} | {ratio(way)} |" for way, what in ways.items()),
        "",
        "Medians over the rounds, the processes in the first alone; the last column is the ratio within a round, "
        "median and range.",
        "",
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
