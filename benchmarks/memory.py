"""Memory and disk of training a mixture, compared with TRL's GRPO with KL and with whole checkpoints.

    python benchmarks/memory.py [--layers 8] [--output benchmarks/results/memory.md]

All members have one size; the policy's weights are float32, under bf16 autocast. Each arm trains in a process of its
own, from its start to the end of its last update:

- memory: the most resident memory of the process, which contains Python, the libraries, and loading the members;
- disk: the bytes of weights (safetensors) in the folder of a run with five checkpoints and the model at its end;
- saving: the median seconds of a checkpoint after the first, which also stores the frozen member.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no member is on the hub; without a network, asking it is slow

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from step_time import member, tokenizer_of
from trl import GRPOConfig, GRPOTrainer

from logitmix import LogitMixGRPOConfig, LogitMixGRPOTrainer
from logitmix.runs.provenance import processor

MEMORY = {
    "trl": "TRL with KL: policy and reference",
    "fp32": "mixture, float32 anchor",
    "bf16": "mixture, bfloat16 anchor",
    "int8": "mixture, int8 anchor (torchao)",
    "bf16-offload": "mixture, bfloat16 anchor, --offload_anchor",
    "int8-offload": "mixture, int8 anchor, --offload_anchor",
    "trl-lora": "TRL with KL: LoRA",
    "lora": "mixture, LoRA pair on one base",
}
DISK = {"always": "whole checkpoints", "once": "frozen member stored once"}
# the largest ratio of a value to another's
BARS = (
    ("memory", "bf16", "trl", 0.85),
    ("memory", "bf16-offload", "trl", 0.85),
    ("memory", "int8", "trl", 0.80),
    ("memory", "int8-offload", "trl", 0.80),
    ("memory", "lora", "trl-lora", 1.02),
    ("disk", "once", "always", 0.62),
    ("saving the weights", "once", "always", 0.60),
)


def save_members(args: argparse.Namespace, folder: Path) -> None:
    tokenizer = tokenizer_of(args.vocab_size)
    tokenizer.unk_token = "w0"  # else loading it beside a Qwen2 model adds Qwen2's unknown token
    for name, seed in (("policy", 0), ("fp32", 1)):
        member(args, seed).save_pretrained(folder / name)
    member(args, 1).bfloat16().save_pretrained(folder / "bf16")
    adapted = get_peft_model(member(args, 0), LoraConfig(r=args.rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    adapted.save_pretrained(folder / "lora")
    for name in ("policy", "fp32", "bf16"):
        tokenizer.save_pretrained(folder / name)


def trainer_of(arm: str, args: argparse.Namespace, folder: Path, run: Path, **more: Any) -> GRPOTrainer:
    is_trl, has_adapter = arm.startswith("trl"), "lora" in arm
    settings: dict[str, Any] = {
        "per_device_train_batch_size": args.rows, "num_generations": args.rows, "max_steps": args.steps,
        "max_completion_length": args.tokens, "bf16": True, "use_cpu": not torch.cuda.is_available(),
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000, "learning_rate": 1e-6,
        "generation_kwargs": {"min_new_tokens": args.tokens},
    } | more  # fmt: skip
    if is_trl:
        config: Any = GRPOConfig(str(run), beta=0.01, model_init_kwargs={"dtype": "float32"}, **settings)
    else:
        kind = arm.removesuffix("-offload")
        anchor = {"int8": "bf16"}.get(kind, kind if arm in MEMORY else "fp32")
        if kind == "int8":
            settings["anchor_quantization"] = "int8"
        if arm != kind:
            settings["offload_anchor"] = True
        config = LogitMixGRPOConfig(str(run), anchor=str(folder / anchor), **settings)
    prompt = " ".join(f"w{2 + i % 50}" for i in range(32))
    return (GRPOTrainer if is_trl else LogitMixGRPOTrainer)(
        str(folder / "policy"),
        reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [prompt] * 32}),
        peft_config=LoraConfig(r=args.rank, target_modules="all-linear") if has_adapter else None,
    )


def measure_memory(arm: str, args: argparse.Namespace, folder: Path, run: Path) -> dict[str, float]:
    trainer_of(arm, args, folder, run).train()
    if torch.cuda.is_available():
        return {"memory": torch.cuda.max_memory_allocated()}
    return {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_disk(arm: str, args: argparse.Namespace, folder: Path, run: Path) -> dict[str, float]:
    """Disk and seconds of a run, with and without the optimizer's state in its checkpoints."""
    result: dict[str, float] = {}
    for name, save_only_model in (("saving the weights", True), ("saving weights and optimizer", False)):
        out = run / str(save_only_model)
        trainer = trainer_of(
            arm, args, folder, out, save_strategy="steps", save_steps=1, save_frozen=arm,
            save_only_model=save_only_model, max_steps=5,
        )  # fmt: skip
        save, seconds = trainer._save_checkpoint, []

        def timed(*arguments: Any, save: Any = save, seconds: list[float] = seconds, **kwargs: Any) -> None:
            start = time.perf_counter()
            save(*arguments, **kwargs)
            seconds.append(time.perf_counter() - start)

        trainer._save_checkpoint = timed
        trainer.train()
        trainer.save_model()
        result |= {name: statistics.median(seconds[1:]), f"{name}, first": seconds[0]}
        result["disk"] = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="Tokens of a completion.")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--measure", choices=["memory", "disk"], help="Only one of the two; default: both.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=[*MEMORY, *DISK], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        with tempfile.TemporaryDirectory(dir=args.folder) as run:
            measure = measure_memory if args.arm in MEMORY else measure_disk
            print(json.dumps(measure(args.arm, args, args.folder, Path(run))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_members(args, Path(folder))
        for arm in [*(MEMORY if args.measure != "disk" else ()), *(DISK if args.measure != "memory" else ())]:
            command = [sys.executable, *sys.argv, "--arm", arm, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[arm] = json.loads(output.splitlines()[-1])
    report = table(results, args)
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")


def table(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    size = sum(p.numel() for p in member(args, 0).parameters())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()["name"]
    lines: list[str] = []
    if "trl" in results:
        lines += ["| training step | memory, GB | of TRL's |", "|---|---|---|"]
        for arm, title in MEMORY.items():
            other = "trl-lora" if "lora" in arm else "trl"
            ratio = results[arm]["memory"] / results[other]["memory"]
            lines.append(f"| {title} | {results[arm]['memory'] / 1e9:.2f} | {ratio:.2f} |")
    if "once" in results:
        columns = [key for key in results["once"] if key != "disk"]
        lines += ["", "| checkpoints | disk, GB | " + " | ".join(f"{c}, s" for c in columns) + " |", "|---" * 6 + "|"]
        for arm, title in DISK.items():
            cells = [f"{results[arm][c]:.2f}" for c in columns]
            lines.append(f"| {title} | {results[arm]['disk'] / 1e9:.2f} | " + " | ".join(cells) + " |")
    lines += ["", "| bar | limit | measured | |", "|---|---|---|---|"]
    titles = MEMORY | DISK
    for what, arm, other, limit in (bar for bar in BARS if bar[1] in results):
        ratio = results[arm][what] / results[other][what]
        met = "met" if ratio <= limit else "**missed**"
        lines.append(f"| {what}: {titles[arm]}, of {titles[other]} | {limit:.2f} | {ratio:.2f} | {met} |")
    return "\n".join(
        [
            "# Memory and disk of training",
            "",
            f"{date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"transformers {version('transformers')}, trl {version('trl')}. Members of {size / 1e6:.0f} M parameters "
            f"(hidden size {args.hidden_size}, {args.layers} layers, vocabulary {args.vocab_size}, tied), LoRA of "
            f"rank {args.rank} on all linear layers; {args.rows} rollouts of {args.tokens} tokens in an update. By "
            f"`python benchmarks/memory.py {' '.join(sys.argv[1:])}`, whose docstring defines the columns.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    main()
