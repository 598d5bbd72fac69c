"""A TRL script for a mixture: the two changed lines are the import and the configuration's `anchor` and `alpha`.

    python examples/trl_script.py --policy path/to/base --anchor path/to/sft

The reward wants the right sum in a box. Two models that fit it are those of `logitmix quickstart`:
`runs/quickstart/base` and `runs/quickstart/sft`.
"""

import argparse
import random
import re

from datasets import Dataset

from logitmix import LogitMixGRPOConfig as GRPOConfig  # TRL: from trl import GRPOConfig, GRPOTrainer
from logitmix import LogitMixGRPOTrainer as GRPOTrainer


def questions(count: int) -> Dataset:
    """Sums of four digits, as the quickstart's models know them; the reward reads the column `answer`."""
    draw = random.Random(0)
    rows = [[draw.randint(1, 9) for _ in range(4)] for _ in range(count)]
    prompts = [f"{a}+{b}-{c}+{d}=?\n" for a, b, c, d in rows]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a + b - c + d) for a, b, c, d in rows]})


def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for the right number in a box, else 0."""
    boxes = [re.findall(r"\\boxed\{(-?\d+)\}", completion) for completion in completions]
    return [float(found[-1:] == [gold]) for found, gold in zip(boxes, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", required=True, help="folder or hub id of the base model, which is trained")
    parser.add_argument("--anchor", required=True, help="folder or hub id of the SFT model, which stays frozen")
    parser.add_argument("--output_dir", default="run")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--use_cpu", action="store_true")
    args = parser.parse_args()

    trainer = GRPOTrainer(
        model=args.policy,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=args.output_dir,
            anchor=args.anchor,
            alpha=0.5,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            max_completion_length=48,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=args.use_cpu,
            bf16=not args.use_cpu,
        ),
        train_dataset=questions(100),
    )
    trainer.train()
    trainer.save_model()
    print(f"the mixture is in {args.output_dir}: alpha {trainer.model.alpha}")


if __name__ == "__main__":
    main()
