"""Memory of mixtures whose members are LoRA adapters, compared with two full members of the same size.

    python benchmarks/adapter_memory.py [--layers 4] [--output benchmarks/results/adapter_memory.md]

Each mixture is built in its own process with random float32 weights. The table shows the size of its weights and the
peak memory of the process (on a GPU, of torch's allocations) above the memory before the mixture was built:

- forward: the logits of a batch at alpha = 0.5;
- training step: a score with gradients, its backward pass with gradient checkpointing, and a step of AdamW.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no member is on the hub; without a network, asking it is slow

import torch
from peft import LoraConfig, get_peft_model
from process_memory import memory_now, peak_memory, reset_peak
from transformers import Qwen2Config, Qwen2ForCausalLM

from logitmix import LogitMixForCausalLM

KINDS = {
    "full": "policy and anchor full models",
    "a": "a: policy an adapter, anchor a full model",
    "b": "b: policy and anchor two adapters on one base",
    "c": "c: policy an adapter, anchor the base",
}
BASE = "base"  # by which the anchor's adapter names the base, which is built in memory


def member(args: argparse.Namespace, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=max(1, args.hidden_size // 128),
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).to(args.device)
    model.name_or_path = BASE
    return model


def lora(args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def mixture(kind: str, args: argparse.Namespace, folder: Path) -> LogitMixForCausalLM:
    policy = member(args, 0)
    if kind == "full":
        return LogitMixForCausalLM.from_members(policy, member(args, 1))
    anchor = {"a": lambda: member(args, 1), "b": lambda: folder, "c": lambda: policy}[kind]()
    return LogitMixForCausalLM.from_members(policy, anchor, peft_config=lora(args))


def save_adapter(args: argparse.Namespace, folder: Path) -> None:
    adapted = get_peft_model(member(args, 0), lora(args))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    adapted.save_pretrained(folder)


def measure(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, int]:
    torch.ones(8, 8, device=args.device) @ torch.ones(8, 8, device=args.device)  # allocate the libraries' buffers
    before = memory_now(args.device)
    model = mixture(kind, args, folder)
    result = {"weights": model.weight_bytes()[0]}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, args.vocab_size, (args.batch_size, args.tokens), generator=generator).to(args.device)
    mask = torch.ones_like(ids)

    reset_peak(args.device)
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask, use_cache=False)
    result["forward"] = peak_memory(args.device) - before

    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    reset_peak(args.device)
    for _ in range(2):  # the second step has the optimizer's state
        log_probs, _ = model.score(ids, mask, ids)
        (-log_probs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    result["training step"] = peak_memory(args.device) - before
    return result


def parse_sizes(parser: argparse.ArgumentParser, kinds: Mapping[str, str]) -> argparse.Namespace:
    """The sizes of the members, and the kind that a process of its own measures, if any."""
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kind", choices=kinds, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_each(kinds: Mapping[str, str], args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """What each kind measures, in a process of its own that this script starts with `--kind`."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(args, Path(folder))
        for kind in kinds:
            command = [sys.executable, *sys.argv, "--kind", kind, "--adapter", folder]
            rows[kind] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_sizes(parser, KINDS)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.kind is not None:
        print(json.dumps(measure(args.kind, args, args.adapter)))
        return
    report = table(measure_each(KINDS, args), args)
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")


def table(results: dict[str, dict[str, int]], args: argparse.Namespace) -> str:
    columns = ("weights", "forward", "training step")
    lines = ["| mixture | " + " | ".join(f"{column}, MB" for column in columns) + " |", "|---" * 4 + "|"]
    for kind, row in results.items():
        cells = [f"{row[c] / 1e6:,.0f} ({row[c] / results['full'][c]:.0%})" for c in columns]
        lines.append(f"| {KINDS[kind]} | " + " | ".join(cells) + " |")
    size = results["full"]["weights"] / 2 / 4e6
    return "\n".join(
        [
            "# Memory of members as adapters",
            "",
            f"{date.today()}, {platform.processor() or platform.machine()}, {args.device}, torch {torch.__version__}, "
            f"peft {version('peft')}. Members of {size:.0f} M parameters in float32 (hidden size {args.hidden_size}, "
            f"{args.layers} layers, vocabulary {args.vocab_size}, tied), LoRA of rank {args.rank} on all linear "
            f"layers; batches of {args.batch_size} sequences of {args.tokens} tokens. Printed by "
            "`python benchmarks/adapter_memory.py`, whose docstring defines the columns.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    main()
