"""What one model keeps of the quickstart's mixture, over seeds, and the tokens that were sampled for it.

    python benchmarks/distilled_quickstart.py FOLDER [--seeds 0 1 2] [--output RESULTS.md]

For each seed, the quickstart trains its mixture in FOLDER/qsSEED, and `logitmix distill` trains a student of it in
FOLDER/studentSEED; what is there already is kept. A few minutes a seed.
"""

import argparse
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from logitmix.runs.files import read_jsonl
from logitmix.runs.provenance import processor

BATCH = 64
DISTILL = (
    "--task arithmetic --bf16 false --use_cpu true --report_to none --max_completion_length 48 "
    f"--per_device_train_batch_size {BATCH} --gradient_accumulation_steps 1 --learning_rate 1e-3 "
    "--lr_scheduler_type cosine --max_steps 150 --train_limit 10240 --logging_steps 1 --save_strategy no "
    "--eval_limit 500"
)
QUICKSTART = "--arms fixed_mixing --eval_limit 50 --eval_every 40"
ROLLOUTS = 256  # of an outer step of the quickstart


def logitmix(*argv: str) -> None:
    subprocess.run([sys.executable, "-m", "logitmix.cli", *argv], check=True)


def sampled_tokens(run: Path, rollouts: int) -> int:
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
    return round(sum(row["completions/mean_length"] for row in rows) * rollouts)


def row_of(folder: Path, seed: int) -> str:
    mixture, student = folder / f"qs{seed}" / "fixed_mixing", folder / f"student{seed}"
    if not (mixture / "model.safetensors").exists():
        logitmix("quickstart", "--output_dir", str(mixture.parent), "--seed", str(seed), *QUICKSTART.split())
    if not (student / "report" / "README.md").exists():
        logitmix("distill", str(mixture), "--output_dir", str(student), "--seed", str(seed), *DISTILL.split())
    rows = [row for row in read_jsonl(student / "report" / "distillation.jsonl") if "minus" in row]
    answers = {row["minus"]: row["answer"] for row in rows}
    rates = [answers["mixture"]["b"], *(answers[name]["a"] for name in ("mixture", "merged", "policy", "anchor"))]
    difference = answers["mixture"]["b_minus_a"]
    low, high = (100 * difference[end] for end in ("low", "high"))
    tokens = [sampled_tokens(mixture, ROLLOUTS), sampled_tokens(student, BATCH)]
    cells = [str(seed), *(f"{100 * rate['value']:.1f}" for rate in rates)]
    cells += [f"{100 * difference['value']:+.1f} [{low:+.1f}, {high:+.1f}]", *(f"{count:,}" for count in tokens)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        "# One model out of the quickstart's mixture",
        "",
        f"`python benchmarks/distilled_quickstart.py FOLDER`, {date.today()}, {processor()['name']}, torch "
        f"{version('torch')}, transformers {version('transformers')}, trl {version('trl')}.",
        "Answer rates in % on 500 test problems, greedy; 95 % paired intervals. Tokens: sampled in training.",
        "",
        "| seed | student | mixture | merged | policy | anchor | difference | mixture tokens | student tokens |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row_of(args.folder, seed) for seed in args.seeds),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
