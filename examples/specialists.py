"""Three small specialists, one product of experts: one multiplies, one adds, one knows the format.

    3*4+5=?
    3*4=12
    12+5=17
    \\boxed{17}

Each member is trained on solutions in which only its own skill is right: the multiplier's sums and the adder's
products are random numbers, and both of the formatter are. The first two end in the format once in three times. None
can solve a problem. Their product can, since a member that is unsure of a token leaves it to one that is sure.

python examples/specialists.py --output_dir runs/specialists     # three minutes on a CPU

`logitmix sweep --weights simplex` then finds weights on half of the test problems, and a table shows who wrote what.
"""

import argparse
import random
import re
import sys
from pathlib import Path

import torch
from transformers import set_seed

from logitmix.cli.__main__ import main as logitmix
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.presets import ensemble
from logitmix.tasks import Problem, Task
from logitmix.tasks.base import Split, validate_request
from logitmix.tasks.templates import BOXED_LINE

MEMBERS = ("formatter", "multiplier", "adder")
SIZES = {"train": 500, "validation": 100, "test": 129}
PATTERN = re.compile(r"\d\*\d=(?P<product>\d+)\n\d+\+\d=(?P<sum>\d+)\n(?P<format>\\boxed\{)\d+(?P<end>\})")


class Products(Task):
    """Questions a*b+c of digits from 1 to 9: all 729, divided by a seed."""

    name = "products"
    template = BOXED_LINE
    alphabet = "".join(sorted(set("0123456789*+=?\n\\boxed{}so it is ")))

    def __init__(self, seed: int = 0) -> None:
        digits = range(1, 10)
        numbers = [(a, b, c) for a in digits for b in digits for c in digits]
        random.Random(seed).shuffle(numbers)
        self._splits: dict[str, list[tuple[int, int, int]]] = {}
        for split, size in SIZES.items():
            self._splits[split], numbers = numbers[:size], numbers[size:]

    def problems(self, split: Split, limit: int | None = None) -> list[Problem]:
        validate_request(split, limit)
        return [solved(*numbers, product=numbers[0] * numbers[1]) for numbers in self._splits[split][:limit]]

    def corpus(self, member: str, size: int) -> list[dict[str, str]]:
        """Training rows of one specialist."""
        rng, rows = random.Random(member), []
        for _ in range(size):
            a, b, c = rng.choice(self._splits["train"])
            product = a * b if member == "multiplier" else rng.randint(1, 81)
            total = product + c if member == "adder" else rng.randint(2, 90)
            problem = solved(a, b, c, product, total)
            completion = self.template.completion(problem.solution, problem.answer)
            if member != "formatter":
                plain = [f"{problem.solution}\n{words} {total}" for words in ("so", "it is")]
                completion = rng.choice([completion, *plain])
            rows.append(self.row(problem, completion))
        return rows


def solved(a: int, b: int, c: int, product: int, total: int | None = None) -> Problem:
    total = product + c if total is None else total
    return Problem(f"{a}*{b}+{c}", str(total), f"{a}*{b}={product}\n{product}+{c}={total}")


def train_members(folder: Path, steps: int) -> None:
    from logitmix.paper.tiny_training import finetune  # TRL takes seconds to import

    task = Products()
    tokenizer = character_tokenizer(task.alphabet)
    for seed, name in enumerate(MEMBERS):
        set_seed(seed)
        model = tiny_model(len(tokenizer))
        finetune(model, tokenizer, task.corpus(name, 64 * steps), folder / name, name, steps, 5e-3, seed)


def who_wrote(model: LogitMixForCausalLM, limit: int) -> dict[str, dict[str, int]]:
    """For the tokens of each kind in greedy responses, the member that gave them the highest probability."""
    task = Products()
    counts = {kind: dict.fromkeys(MEMBERS, 0) for kind in PATTERN.groupindex}
    prompts = [task.prompt(problem) for problem in task.problems("test", limit)]
    inputs = model.tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.eval().generate(
        **inputs, max_new_tokens=32, do_sample=False, output_member_logprobs=True, return_dict_in_generate=True
    )
    for ids, log_probs in zip(out.sequences[:, inputs["input_ids"].shape[1] :], out.member_logprobs, strict=True):
        found = PATTERN.match(model.tokenizer.decode(ids))  # one token a character
        for kind in PATTERN.groupindex if found else ():
            for position in range(*found.span(kind)):
                counts[kind][MEMBERS[int(log_probs[position].argmax())]] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, default=Path("runs/specialists"))
    parser.add_argument("--steps", type=int, default=400, help="updates of each member, 64 rows each")
    parser.add_argument("--eval_limit", type=int, default=SIZES["test"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_members(args.output_dir, args.steps)
    folders = [str(args.output_dir / name) for name in MEMBERS]
    sys.path.insert(0, str(Path(__file__).parent))
    logitmix([
        "sweep", "--model_name_or_path", folders[0], "--members", *folders[1:], "--weights", "simplex",
        "--task", "specialists.Products", "--eval_limit", str(args.eval_limit), "--max_new_tokens", "32",
        "--output_dir", str(args.output_dir / "sweep"),
    ])  # fmt: skip
    print("Who gave the tokens of each kind their highest probability, at equal weights:")
    for kind, by_member in who_wrote(ensemble(folders), args.eval_limit).items():
        total = sum(by_member.values()) or 1
        print(f"{kind:8}", *(f"{name} {100 * count / total:3.0f} %" for name, count in by_member.items()))


if __name__ == "__main__":
    main()
