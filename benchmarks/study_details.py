"""Two details of the reproductions that their reports do not have, for docs/reproduce.md.

python benchmarks/study_details.py kinds runs/reproduce-smollm2          # right sums and differences of each arm
python benchmarks/study_details.py ratios runs/reproduce-tiny/seed-0     # policy / mixture, token by token
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitmix.mixture.mixing import mix_logits

ALPHA = 0.5
FIRST_STEP = 1


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(run: Path) -> None:
    """Right answers of each evaluation of word problems, apart for sums and differences."""
    for path in sorted(run.glob("seed-*/*/evaluation_responses.jsonl")):
        right: dict[tuple[int, str, str], list[bool]] = defaultdict(list)
        for row in rows_of(path):
            first, second = map(int, re.findall(r"\d+", row["prompt"].split("user")[-1])[:2])
            kind = "sums" if str(first + second) == row["gold"] else "differences"
            right[row["step"], row["name"], kind].append(row["answer_ok"])
        for (step, name, kind), each in sorted(right.items()):
            print(f"{path.parent.relative_to(run)}, step {step}, {name}: {sum(each)} of {len(each)} {kind}")


@torch.no_grad()
def ratios(seed: Path) -> None:
    """The base's probability over the untrained mixture's, at each token of the first right answers."""
    tokenizer = AutoTokenizer.from_pretrained(seed / "base")
    members = [AutoModelForCausalLM.from_pretrained(seed / name).eval() for name in ("base", "sft")]
    found: dict[int, list[float]] = defaultdict(list)
    rollouts = [row for row in rows_of(seed / "policy_target" / "completions.jsonl") if row["step"] == FIRST_STEP]
    right = [row for row in rollouts if row["task_reward"] > 0]
    for row in right:
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
        )
        completion = [*completion, tokenizer.eos_token_id]
        logits = [member(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] for member in members]
        policy, mixture = (
            logits[0].log_softmax(-1),
            mix_logits(logits, torch.tensor([1 - ALPHA, ALPHA])).log_softmax(-1),
        )
        for log_ratios, token in zip(policy - mixture, completion, strict=True):
            found[token].append(float(log_ratios[token].exp()))
    print(f"{len(right)} right rollouts of {len(rollouts)}")
    for token, each in sorted(found.items(), key=lambda item: median(item[1])):
        name = tokenizer.convert_ids_to_tokens(token)
        print(f"{name!r}: {len(each)} times, median {median(each):.3f}, {min(each):.3f} to {max(each):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detail", choices=["kinds", "ratios"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    {"kinds": kinds, "ratios": ratios}[args.detail](args.folder)
