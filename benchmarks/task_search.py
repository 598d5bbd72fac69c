"""Which task, template and SFT give a pair in which each member has what the other lacks?

    python benchmarks/task_search.py --model models/smollm2 --tasks word_problems --templates answer_is boxed \
        --sft_tasks word_problems word_sums --demonstrate solution answer --sft_steps 2 5 10 --output task_search.jsonl

For each combination it trains a LoRA anchor and decodes validation questions, never test problems, with both members.
A row is a candidate if the base is right anywhere in the text more often, and the anchor is in the format more often.
Every row is a line of the output file, also of combinations that are no candidates.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from logitmix.cli import sft
from logitmix.cli.options.parser import build
from logitmix.evaluation.complement import complement
from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.openings import NUM_PROBLEMS, Opening, measure_openings, opening_weights, summarise
from logitmix.evaluation.requests import Response, make_batches, make_requests
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.runs.files import append_jsonl
from logitmix.tasks import Task, load_task


def measure(source: str, task: Task, questions: int, max_new_tokens: int) -> tuple[list[Response], list[Opening]]:
    """Greedy responses to the validation questions, and how the model opens the format."""
    tokenizer, model = require_tokenizer(source), load_member(source).eval()
    problems = task.problems("validation", questions)
    decode = make_decoder(model, tokenizer, task, problems, max_new_tokens)
    batches = make_batches(make_requests({source: None}, len(problems)), 64)
    responses = [response for batch in decode(batches) for response in batch]
    return responses, measure_openings(model, tokenizer, task, problems[:NUM_PROBLEMS])


def train_anchor(args: argparse.Namespace, template: str, sft_task: str, demonstrate: str, steps: int) -> str:
    """The folder of an anchor, which is trained if it does not exist yet."""
    folder = Path(args.folder) / f"{sft_task}-{template}-{demonstrate}-{steps}"
    settings = {
        "model_name_or_path": args.model, "task": sft_task, "template": template, "demonstrate": demonstrate,
        "train_limit": 8 * steps, "max_steps": steps, "use_peft": True,
        "learning_rate": args.learning_rate, "per_device_train_batch_size": 8, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "output_dir": str(folder),
    }  # fmt: skip
    if not (folder / "adapter_config.json").exists():
        sft.run(build(sft.SFTOptions, None, settings), ["logitmix", "sft"])
    return str(folder)


def compare(base: list[Response], anchor: list[Response]) -> dict[str, Any]:
    """Whether the pair is a candidate, and the rates of both members."""
    found = complement(base, anchor, "base", "anchor")
    row = {
        "questions": found.n,
        "candidate": found.lenient.b_minus_a.value < 0 < found.format.b_minus_a.value,
        "only_base_lenient": found.lenient_cross.only_a, "only_anchor_lenient": found.lenient_cross.only_b,
    }  # fmt: skip
    for rate in ("format", "answer", "lenient", "truncated"):
        difference = getattr(found, rate)
        row |= {f"base_{rate}": difference.a.value, f"anchor_{rate}": difference.b.value}
    return row


def compare_openings(base: list[Opening], anchor: list[Opening]) -> dict[str, Any]:
    """The margins by which the members open the format, and the anchor's weight that suffices; empty without any."""
    if not base or not anchor:
        return {}
    weights = opening_weights(base, anchor)
    margins = {"base_margin": summarise(base).nats, "anchor_margin": summarise(anchor).nats}
    return margins | {"sufficient_weight": None if weights is None else weights[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--tasks", nargs="+", default=["word_problems"])
    parser.add_argument("--templates", nargs="+", default=["answer_is", "boxed"])
    parser.add_argument("--sft_tasks", nargs="+", default=["word_problems", "word_sums"])
    parser.add_argument("--demonstrate", nargs="+", default=["solution", "answer"])
    parser.add_argument("--sft_steps", nargs="+", type=int, default=[2, 5, 10])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--folder", default="runs/task-search", help="of the anchors, which are trained once")
    parser.add_argument("--output", default="task_search.jsonl")
    args = parser.parse_args()
    for name in args.tasks:
        for template in args.templates:
            task = load_task(name, template=template)
            base, base_openings = measure(args.model, task, args.questions, args.max_new_tokens)
            for sft_task, demonstrate, steps in product(args.sft_tasks, args.demonstrate, args.sft_steps):
                source = train_anchor(args, template, sft_task, demonstrate, steps)
                anchor, openings = measure(source, task, args.questions, args.max_new_tokens)
                row = {
                    "task": name, "template": template, "sft_task": sft_task, "demonstrate": demonstrate,
                    "sft_steps": steps,
                } | compare(base, anchor) | compare_openings(base_openings, openings)  # fmt: skip
                append_jsonl(Path(args.output), [row])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
