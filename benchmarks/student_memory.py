"""Memory of distilling two adapters on one base into a third: on the members' base, and on a copy of it.

    python benchmarks/student_memory.py [--output benchmarks/results/student_memory.md]

Each student is distilled in a process of its own, with random weights. "weights" are those of mixture and student,
shared ones once. The peak is the most that the process held above its memory before the mixture was built, in two
updates: the divergence from the mixture, its backward pass with gradient checkpointing, and a step of AdamW.
"""

import argparse
import json
import os
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from adapter_memory import lora, measure_each, mixture, parse_sizes
from process_memory import memory_now, peak_memory, reset_peak

from logitmix.loss_head.distiller import FusedDistiller
from logitmix.runs.provenance import processor
from logitmix.training.students import build_student

KINDS = {"copy": "on a copy of the base", "shared": "on the members' base"}


def measure(kind: str, args: argparse.Namespace, adapter: Path) -> dict[str, int]:
    torch.ones(8, 8) @ torch.ones(8, 8)  # allocate the libraries' buffers
    before = memory_now(args.device)
    teacher = mixture("b", args, adapter).requires_grad_(False).eval()
    if kind == "shared":
        student = build_student(teacher, "policy", peft_config=lora(args))
    else:
        student = build_student(teacher, "policy")
        student.add_adapter(lora(args))
    base = student.get_base_model() if kind == "shared" else student
    student.train()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    held = {p.data_ptr(): p for model in (teacher, student) for p in model.parameters()}
    ids = torch.randint(2, args.vocab_size, (args.batch_size, args.tokens), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    distiller = FusedDistiller(base, teacher)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    reset_peak(args.device)
    for _ in range(2):
        divergence_N, _ = distiller(base, ids, torch.ones_like(ids), scored)
        divergence_N.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "weights": sum(p.numel() * p.element_size() for p in held.values()),
        "peak": peak_memory(args.device) - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_sizes(parser, KINDS)
    args.device = "cpu"
    if args.kind is not None:
        print(json.dumps(measure(args.kind, args, args.adapter)))
        return
    report = table(measure_each(KINDS, args), args)
    print(report)
    if args.output is not None:
        args.output.write_text(report + "\n")


def table(rows: dict[str, dict[str, int]], args: argparse.Namespace) -> str:
    columns = ("weights", "peak")
    lines = ["| student | weights, MB | peak of an update, MB |", "|---|---|---|"]
    for kind, row in rows.items():
        cells = [f"{row[c] / 1e6:,.0f} ({row[c] / rows['copy'][c]:.0%})" for c in columns]
        lines.append(f"| {KINDS[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# Memory of a student that is an adapter",
            "",
            f"{date.today()}, {processor()['name']}, torch {torch.__version__}, peft {version('peft')}. "
            f"A mixture of two adapters on one base (hidden size {args.hidden_size}, {args.layers} layers, vocabulary "
            f"{args.vocab_size}, tied, float32), and a student with an adapter, all of rank {args.rank} on all linear "
            f"layers; batches of {args.batch_size} sequences of {args.tokens} tokens. Printed by "
            "`python benchmarks/student_memory.py`, whose docstring defines the columns.",
            "",
            *lines,
        ]
    )


if __name__ == "__main__":
    main()
