"""Cost of the adaptive weight: the time of a step's validation relative to the step's rollouts.

    python benchmarks/adaptive_overhead.py [--rounds 7] [--output benchmarks/results/adaptive_overhead.md]

In the paper a step has 2,048 rollouts and 200 greedy decodes (100 questions, by the policy and by the mixture), which
is 9.8 %. The sizes here keep that proportion: 512 rollouts and 50 greedy decodes. Rollouts and validation are the
trainer's own (`_generate`, `validate`) on one model, alternating (A B A B ...).

Every decode runs to its full length, because untrained members never emit EOS. In a real run both end earlier, and
each batch takes as long as its longest response. On a CPU the time is proportional to the number of sequences. On a
GPU a decoding step may take as long for 50 sequences as for 500, so the share also depends on the number of batches of
the rollouts (`rollout_batch_size`): validation is at least one batch.
"""

import argparse
import os
import platform
import statistics
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from step_time import member, now, tokenizer_of

from logitmix import LogitMixForCausalLM, LogitMixGRPOConfig, LogitMixGRPOTrainer
from logitmix.training.alpha.validation import validate

GROUP = 8


def trainer_of(args: argparse.Namespace, folder: str, rollout_batch_size: int) -> LogitMixGRPOTrainer:
    words = torch.randint(2, args.vocab_size, (args.rollouts, args.prompt_tokens)).tolist()
    dataset = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in words]})
    return LogitMixGRPOTrainer(
        LogitMixForCausalLM.from_members(member(args, 0), member(args, 1)),
        reward_funcs=lambda completions, **_: [float("w7" in text) for text in completions],
        args=LogitMixGRPOConfig(
            folder,
            alpha_controller="adaptive",
            validation_size=args.questions,
            per_device_train_batch_size=args.rollouts,
            num_generations=GROUP,
            max_completion_length=args.completion_tokens,
            rollout_batch_size=rollout_batch_size,
            generation_kwargs={"suppress_tokens": [1]},  # the end of a sequence
            bf16=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=dataset,
        validation_dataset=dataset.select(range(args.questions)),
        processing_class=tokenizer_of(args.vocab_size),
    )


def seconds_of_a_step(trainer: LogitMixGRPOTrainer) -> tuple[float, float]:
    """Seconds of a step's rollouts and of the validation after it."""
    prompts = trainer.train_dataset["prompt"][: trainer.args.generation_batch_size // GROUP]
    trainer.model.train()
    start = now()
    trainer._generate([prompt for prompt in prompts for _ in range(GROUP)])
    between = now()
    validate(trainer, trainer.validation_questions.after(0), trainer.model.alpha, with_anchor=False)
    return between - start, now() - between


def table(seconds: dict[int, list[tuple[float, float]]], args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("logitmix", "torch", "transformers", "trl"))
    lines = [
        "# Cost of the adaptive weight",
        "",
        f"`python benchmarks/adaptive_overhead.py`, {date.today()}, {device} ({platform.machine()}); {packages}.",
        f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        f"Sizes: {', '.join(f'{k} {v}' for k, v in vars(args).items() if k != 'output')}. Medians over the rounds, in",
        f"seconds; share: validation over rollouts of the same round. {2 * args.questions} greedy decodes to",
        f"{args.rollouts} rollouts are {2 * args.questions / args.rollouts:.1%} (the paper: 200 to 2,048, 9.8 %). All "
        f"decodes are {args.completion_tokens} tokens long.",
        "",
        "| rollouts sampled at a time | rollouts | validation | share (min to max) |",
        "|---|---|---|---|",
    ]
    for size, rounds in seconds.items():
        shares = [validation / rollouts for rollouts, validation in rounds]
        rollouts, validation = (statistics.median(column) for column in zip(*rounds, strict=True))
        lines.append(
            f"| {size} | {rollouts:.2f} | {validation:.3f} "
            f"| {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=512, help="rollouts per step, 8 per question")
    parser.add_argument("--questions", type=int, default=25, help="validation questions, with two greedy decodes each")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 512], help="rollouts per sampling batch")
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--completion_tokens", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=4_000)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    seconds: dict[int, list[tuple[float, float]]] = {size: [] for size in args.batch_sizes}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {size: trainer_of(args, folder, size) for size in args.batch_sizes}
        for i in range(args.rounds + 1):
            for size, trainer in trainers.items():
                step = seconds_of_a_step(trainer)
                if i:  # the first round warms up
                    seconds[size].append(step)
                print(f"round {i}, {size} at a time: rollouts {step[0]:.2f} s, validation {step[1]:.2f} s", flush=True)
    text = table(seconds, args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
