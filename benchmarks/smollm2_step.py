"""A training step of a real language model: mixtures compared with TRL's GRPO with KL, all with LoRA.

    python benchmarks/smollm2_step.py --model models/smollm2 --anchor runs/words-sft [--output FILE]

The anchor is a LoRA adapter on the model, as `logitmix sft --use_peft` makes it. All arms train a new adapter on the
same word problems, with the same numbers of rollouts, tokens and updates:

- mixture, adapters: policy and anchor are adapters on one base, decoded jointly;
- mixture, alternating: the anchor is merged into a model of its own, and the members take turns in decoding;
- TRL, KL: the anchor is merged into the base, which without the new adapter is the reference.

Times: the arms alternate in one process; seconds of a step (rollouts, scoring, one update), medians over the rounds.
Memory: the most resident memory of a process of each arm's own, libraries included.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from process_memory import peak_memory
from step_time import PHASES, Timed, TimedMixture, TimedTRL
from transformers import PrinterCallback
from trl import GRPOConfig

from logitmix import LogitMixForCausalLM, LogitMixGRPOConfig
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.runs.provenance import processor
from logitmix.tasks import load_task

ARMS = ("mixture, adapters", "mixture, alternating", "TRL, KL")
TIME_BARS = {"mixture, adapters": 1.10, "mixture, alternating": 0.95}
MEMORY_BAR = 0.75


def build(arm: str, args: argparse.Namespace, folder: str) -> Timed:
    torch.manual_seed(0)
    tokenizer, task = require_tokenizer(args.model), load_task("word_problems")
    problems = task.problems("train", 64)
    common = {
        "output_dir": folder, "per_device_train_batch_size": args.rollouts, "num_generations": 8, "max_steps": 1,
        "max_completion_length": args.tokens, "bf16": args.dtype == "bfloat16", "gradient_checkpointing": False,
        # no completion ends early, so that all arms sample the same number of tokens
        "generation_kwargs": {"min_new_tokens": args.tokens},
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    peft, kwargs = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), {"dtype": getattr(torch, args.dtype)}
    arguments: dict[str, Any] = {
        "reward_funcs": lambda completions, **_: [float(len(text[0]["content"])) for text in completions],
        "train_dataset": Dataset.from_dict({"prompt": [task.prompt(problem) for problem in problems]}),
        "processing_class": tokenizer,
    }
    if arm == "TRL, KL":
        model = load_member(args.anchor, True, **kwargs)
        trainer = TimedTRL(
            model, args=GRPOConfig(beta=0.04, loss_type="grpo", **common), peft_config=peft, **arguments
        )
    else:
        shares = arm == "mixture, adapters"
        anchor = args.anchor if shares else load_member(args.anchor, True, **kwargs)
        model = LogitMixForCausalLM.from_members(args.model, anchor, peft_config=peft, **kwargs)
        config = LogitMixGRPOConfig(decoding="joint" if shares else "alternating", **common)
        trainer = TimedMixture(model, args=config, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_times(args: argparse.Namespace, folder: str) -> dict[str, list[dict[str, float]]]:
    times: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for i in range(args.rounds + 1):
        for arm in ARMS if i % 2 else ARMS[::-1]:
            trainer = build(arm, args, folder)
            trainer.train()
            if i:  # the first round warms up
                times[arm].append(dict(trainer.seconds))
            print(f"round {i}, {arm}: {trainer.seconds}", file=sys.stderr, flush=True)
    return times


def measure_peak(arm: str, args: argparse.Namespace) -> float:
    """In a process of its own."""
    command = [sys.executable, __file__, "--peak_of", arm]
    for name in ("model", "anchor", "rollouts", "tokens", "dtype", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(printed.splitlines()[-1]))


def table(args: argparse.Namespace, folder: str) -> str:
    times, peaks = measure_times(args, folder), {arm: measure_peak(arm, args) for arm in ARMS}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    rows = []
    for arm in ARMS:
        whole = [sum(seconds.values()) for seconds in times[arm]]
        ratios = [a / sum(b.values()) for a, b in zip(whole, times["TRL, KL"], strict=True)]
        phases = " | ".join(f"{statistics.median(seconds[phase] for seconds in times[arm]):.1f}" for phase in PHASES)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = peaks[arm] / peaks["TRL, KL"]
        bar = f"{TIME_BARS[arm]:.2f}" if arm in TIME_BARS else ""
        rows.append(
            f"| {arm} | {phases} | {statistics.median(whole):.1f} | {ratio} | {bar} | {peaks[arm]:.2f} "
            f"| {memory:.2f} |"
        )
    return "\n".join(
        [
            "# A training step of SmolLM2-135M-Instruct",
            "",
            f"`python benchmarks/smollm2_step.py --rounds {args.rounds} --dtype {args.dtype}`:",
            f"{args.rollouts} rollouts of {args.tokens} tokens, 8 a question, one update; LoRA of rank 16 on all",
            f"linear layers, {args.dtype}, threads: {args.threads}, {processor()['name']}. Seconds, medians over the",
            "rounds; ratios within a round.",
            "",
            f"| | {' | '.join(PHASES)} | step | / TRL | at most | peak memory, GB | / TRL |",
            "|---|" + "---|" * (len(PHASES) + 5),
            *rows,
            "",
            f"Memory of the mixture of adapters: at most {MEMORY_BAR} of TRL's.",
            "",
            f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--anchor", default="runs/words-sft")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak_of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.peak_of is not None:
            build(args.peak_of, args, folder).train()
            print(json.dumps(peak_memory("cpu") / 1e9))
            return
        text = table(args, folder)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
