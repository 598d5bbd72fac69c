"""Time of the phases of a training step: a mixture compared with TRL's GRPO with and without KL.

    python benchmarks/step_time.py [--rounds 5] [--output benchmarks/results/step_time.md]

The mixture and TRL with KL hold a trained and a frozen model of the same size; all arms sample the same number of
tokens and make the same number of updates. They alternate in one process (A B C A B C …); the table shows medians over
the rounds, and the ratios within each round of the first arm, the mixture with default settings, to the others. The
mixture also runs with the anchor recomputed in each update, and with the reference loss head. The phases:

- rollouts: sampling the completions;
- scoring: log-probabilities under the old policy (both) and under the reference model (TRL with KL);
- loss: forward and backward of the objective;
- update: the optimizer's step.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from logitmix import LogitMixForCausalLM, LogitMixGRPOConfig, LogitMixGRPOTrainer

PHASES = ("rollouts", "scoring", "loss", "update")
# the largest ratio of one arm's time to another's, without rollouts
BARS = (("mixture", "TRL, KL", 0.80), ("mixture, anchor recomputed", "TRL, KL", 1.00))


def now() -> float:
    """Seconds, after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """A mixin that adds up the seconds of each phase of a GRPO trainer, in `seconds`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        super().__init__(*args, **kwargs)

    @contextmanager
    def timed(self, phase: str):
        start = now()
        try:
            yield
        finally:
            self.seconds[phase] += now() - start

    def _generate_single_turn(self, *args: Any, **kwargs: Any):
        with self.timed("rollouts"):
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.timed("scoring"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any):
        with self.timed("loss"):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any):
        start = now()
        inputs = super()._prepare_inputs(*args, **kwargs)
        self.seconds["loss"] -= now() - start  # it is called inside training_step
        return inputs

    def create_optimizer(self, *args: Any, **kwargs: Any):
        optimizer = super().create_optimizer(*args, **kwargs)
        step = optimizer.step

        def timed_step(*args: Any, **kwargs: Any):
            with self.timed("update"):
                return step(*args, **kwargs)

        optimizer.step = timed_step
        return optimizer


class TimedMixture(Timed, LogitMixGRPOTrainer):
    pass


class TimedTRL(Timed, GRPOTrainer):
    pass


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the words `w2`, `w3`, …"""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", padding_side="left")


def member(args: argparse.Namespace, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
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
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The training arguments of all arms."""
    return {
        "per_device_train_batch_size": args.rollouts // args.updates, "steps_per_generation": args.updates,
        "num_generations": 8, "max_steps": args.updates * args.steps, "max_completion_length": args.completion_tokens,
        # no EOS: every completion has its full length, so all arms sample the same number of tokens
        "generation_kwargs": {"suppress_tokens": [1]},
        "bf16": torch.cuda.is_available(), "gradient_checkpointing": False, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    }  # fmt: skip


def trainers(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Timed]]:
    """Functions that build the trainer of each arm for one round."""
    tokenizer = tokenizer_of(args.vocab_size)
    words = torch.randint(2, args.vocab_size, (args.rollouts * 8, args.prompt_tokens)).tolist()
    dataset = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in words]})
    member(args, 0).save_pretrained(folder / "start")

    def build(trainer: type, config: type, model: Any, **arm: Any) -> Timed:
        result = trainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
            args=config(str(folder / "out"), **settings(args), **arm),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        result.remove_callback(PrinterCallback)
        return result

    def mixture(**arm: Any) -> Timed:
        model = LogitMixForCausalLM.from_members(Qwen2ForCausalLM.from_pretrained(folder / "start"), member(args, 1))
        return build(TimedMixture, LogitMixGRPOConfig, model, **arm)

    def trl(beta: float) -> Timed:
        model = Qwen2ForCausalLM.from_pretrained(folder / "start")
        return build(TimedTRL, GRPOConfig, model, beta=beta, loss_type="grpo")

    return {
        "mixture": mixture,
        "mixture, anchor recomputed": lambda: mixture(anchor_states="recompute"),
        "mixture, reference head": lambda: mixture(loss_head="reference"),
        "TRL, KL": lambda: trl(0.01),
        "TRL, no KL": lambda: trl(0.0),
    }


def table(rounds: list[dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    arms = list(rounds[0])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = ", ".join(f"{name} {version(name)}" for name in ("logitmix", "torch", "transformers", "trl"))
    sizes = {k: v for k, v in vars(args).items() if k != "output"}
    lines = [
        "# Time of a training step",
        "",
        f"`python benchmarks/step_time.py`, {date.today()}, {device} ({platform.machine()}); {packages}.",
        f"Sizes: {', '.join(f'{k} {v}' for k, v in sizes.items())}. Medians over the rounds, seconds per batch of",
        "rollouts with its updates.",
        "",
        f"| phase | {' | '.join(arms)} |",
        "|---|" + "---|" * len(arms),
    ]
    ratios = ["", f"The {arms[0]}'s time over another's of the same round: median (min to max).", ""]
    ratios += [f"| phase | {' | '.join(arms[1:])} |", "|---|" + "---|" * (len(arms) - 1)]
    sums = {"all but rollouts": PHASES[1:], "all": PHASES}
    for row in (*PHASES, *sums):
        phases = sums.get(row, (row,))
        seconds = {arm: [sum(r[arm][phase] for phase in phases) for r in rounds] for arm in arms}
        lines.append(f"| {row} | {' | '.join(f'{statistics.median(seconds[arm]):.3f}' for arm in arms)} |")
        cells = []
        for arm in arms[1:]:
            of_rounds = [a / b for a, b in zip(seconds[arms[0]], seconds[arm], strict=True) if b]
            cells.append(
                f"{statistics.median(of_rounds):.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})"
                if of_rounds
                else "-"
            )
        ratios.append(f"| {row} | {' | '.join(cells)} |")
    bars = ["", "Targets, without rollouts:", "", "| | ratio | at most | |", "|---|---|---|---|"]
    for variant, baseline, most in BARS:
        found = statistics.median(
            sum(r[variant][p] for p in PHASES[1:]) / sum(r[baseline][p] for p in PHASES[1:]) for r in rounds
        )
        bars.append(
            f"| {variant} / {baseline} | {found:.2f} | {most:.2f} | {'met' if found <= most else '**missed**'} |"
        )
    return "\n".join([*lines, *ratios, *bars]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="batches of rollouts per round")
    parser.add_argument("--updates", type=int, default=2, help="optimizer updates per batch of rollouts")
    parser.add_argument("--rollouts", type=int, default=32, help="rollouts per step, 8 per question")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--completion_tokens", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arms = trainers(args, Path(folder))
        rounds = []
        for i in range(args.rounds + 1):
            seconds = {}
            for name, build in arms.items():
                trainer = build()
                trainer.train()
                seconds[name] = {phase: s / args.steps for phase, s in trainer.seconds.items()}
            if i:  # the first round warms up
                rounds.append(seconds)
            print(f"round {i}: {seconds}", flush=True)
    text = table(rounds, args)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
