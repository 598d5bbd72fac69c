"""Throughput of the verifier compared with plain math-verify, and its slowest pair.

    python benchmarks/verifier.py [--data ../shared/data] [--rounds 3] [--output benchmarks/results/verifier.md]

Both verifiers alternate in one process. The pairs:

- golds: MATH reference answers compared with themselves, the most common kind of correct answer
- restyled: the same answers in another notation
- mutated: reference answers and wrong answers derived from them
- hard: the labelled pairs of tests/helpers/hard_cases.py
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
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path

from math_verify import parse, verify

from logitmix.tasks import answers_match
from logitmix.tasks.templates import last_boxed
from logitmix.tasks.verify import answers, values

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
    answers.read.cache_clear()  # each round reads and evaluates anew
    values._cached_value.cache_clear()
    start = time.perf_counter()
    for case in cases_of_a_kind:
        with suppress(Exception):  # raised by math-verify; its time counts
            compare(*case)
    return len(cases_of_a_kind) / (time.perf_counter() - start)


def processor_seconds(case: tuple[str, str]) -> float:
    start = time.process_time()
    answers_match(*case)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    versions = ", ".join(f"{name} {version(name)}" for name in ("logitmix", "math-verify", "mpmath"))
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# The verifier's throughput",
        "",
        f"`python benchmarks/verifier.py --count {options.count} --rounds {options.rounds}`, {date.today()}; "
        f"{platform.machine()}, {cores} cores, Python {platform.python_version()}; {versions}.",
        f"Comparisons a second, one process, medians over {options.rounds} rounds in turns; the least ratio.",
        f"Load of the machine at the start: {os.getloadavg()[0]:.1f} on {cores} cores; rates are low, ratios fair.",
        "",
        "| pairs | number | logitmix | math-verify | ratio |",
        "|---|---|---|---|---|",
    ]
    answers_match("[1,2]\\cap[0,1]", "\\{1\\}")  # exclude imports
    plain_math_verify("1+x", "x+1")
    chosen_pairs = pairs(options.data, options.count)
    slowest = max((processor_seconds(case), case) for case in chain(*chosen_pairs.values()))
    for kind, chosen in chosen_pairs.items():
        rounds = [(rate(answers_match, chosen), rate(plain_math_verify, chosen)) for _ in range(options.rounds)]
        speed, baseline = (statistics.median(side) for side in zip(*rounds, strict=True))
        least = min(one / other for one, other in rounds)
        lines.append(f"| {kind} | {len(chosen)} | {speed:,.0f} | {baseline:,.0f} | {least:.1f} |")
    lines += [
        "",
        f"The slowest pair takes {slowest[0]:.2f} s of the processor: `{slowest[1][0]}` and `{slowest[1][1]}`.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
