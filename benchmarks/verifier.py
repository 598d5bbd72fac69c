"""Throughput of the verifier compared with plain math-verify, and of its pool by number of workers.

    python benchmarks/verifier.py [--data ../shared/data] [--rounds 3] [--output benchmarks/results/verifier.md]

Both verifiers alternate in one process. The pairs:

- golds: MATH reference answers compared with themselves, the most common kind of correct answer
- restyled: the same answers in another notation
- mutated: reference answers and wrong answers derived from them
- hard: the labelled pairs of tests/helpers/hard_cases.py
- pool: formulas that are all sent to the worker processes
"""

import argparse
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from logitmix.tasks.verify.pool import Pool
from math_verify import parse, verify

from logitmix.tasks import answers_match
from logitmix.tasks.templates import last_boxed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the labelled pairs and the mutations of the tests


def plain_math_verify(prediction: str, gold: str) -> bool:
    """math-verify, used as in its README."""
    return bool(verify(parse(f"${gold}$"), parse(f"${prediction}$")))


def pairs(data: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    from tests.helpers.hard_cases import DIFFERENT, EQUAL, cases
    from tests.helpers.mutations import mutations

    chance = random.Random(0)
    rows = [json.loads(line) for line in (data / "math" / "train.jsonl").read_text("utf-8").split("\n") if line]
    golds = chance.sample([gold for row in rows if (gold := last_boxed(row["solution"]))], count)
    formulas = [gold for gold in golds if not gold.lstrip("-").isdigit()]
    return {
        "golds": [(gold, gold) for gold in golds],
        "restyled": [("$ " + gold.replace("\\frac", "\\dfrac") + " $", gold) for gold in formulas],
        "mutated": [
            (wrong, gold) for gold, other in pairwise(golds) for wrong in list(mutations(gold, other).values())[-2:]
        ],
        "hard": cases(EQUAL) + cases(DIFFERENT),
    }


def rate(compare, cases_of_a_kind: list[tuple[str, str]]) -> float:
    start = time.perf_counter()
    for case in cases_of_a_kind:
        with suppress(Exception):  # raised by math-verify; its time counts
            compare(*case)
    return len(cases_of_a_kind) / (time.perf_counter() - start)


def pool_rate(size: int, count: int) -> float:
    pool = Pool(size=size)
    work = [(f"(x+{n})^2", f"x^2+{2 * n}x+{n * n}") for n in range(count)]
    with ThreadPoolExecutor(2 * size) as threads:
        list(threads.map(lambda case: pool.compare(*case), work[: 8 * size]))  # starts the workers
        start = time.perf_counter()
        found = list(threads.map(lambda case: pool.compare(*case), work))
        seconds = time.perf_counter() - start
    pool.close()
    assert all(right for right, _ in found)
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    versions = ", ".join(f"{name} {version(name)}" for name in ("logitmix", "math-verify", "sympy", "mpmath"))
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# The verifier's throughput",
        "",
        f"`python benchmarks/verifier.py --count {options.count} --rounds {options.rounds}`, {date.today()}; "
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}; {versions}.",
        f"Comparisons a second, one process, medians over {options.rounds} rounds in turns; the least ratio.",
        "The machine was shared: rates are low, ratios fair.",
        "",
        "| pairs | number | logitmix | math-verify | ratio |",
        "|---|---|---|---|---|",
    ]
    answers_match("[1,2]\\cap[0,1]", "\\{1\\}")  # exclude imports and the start of the first worker
    plain_math_verify("1+x", "x+1")
    for kind, chosen in pairs(options.data, options.count).items():
        rounds = [(rate(answers_match, chosen), rate(plain_math_verify, chosen)) for _ in range(options.rounds)]
        speed, baseline = (statistics.median(side) for side in zip(*rounds, strict=True))
        least = min(one / other for one, other in rounds)
        lines.append(f"| {kind} | {len(chosen)} | {speed:,.0f} | {baseline:,.0f} | {least:.1f} |")
    lines += ["", "| pool workers | comparisons a second |", "|---|---|"]
    for size in range(1, cores + 1):
        lines.append(f"| {size} | {statistics.median(pool_rate(size, 300) for _ in range(options.rounds)):,.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
