"""`logitmix quickstart`: the paper's story at toy size, from nothing to a report, on a CPU and without downloads.

1. A small Qwen2 learns arithmetic from worked solutions that reason well and rarely keep the format: the base.
2. Demonstrations that keep the format and leap over the steps turn a copy of it into the anchor: the SFT model.
3. The untrained pair is mixed at every alpha, by both schemes (the paper's table 4).
4. Two arms train with the same rollouts: the mixture from the base, and GRPO with a KL penalty from the SFT model.
5. One table, two figures, and every number as JSON lines.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    set_seed,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from trl import SFTConfig, SFTTrainer

from logitmix.commands.arguments import parse
from logitmix.commands.callbacks import EverySteps, train_watched
from logitmix.commands.runs import (
    EVALUATIONS_FILE,
    RESPONSES_FILE,
    append_jsonl,
    console,
    find_checkpoint,
    progress_bar,
    read_jsonl,
    record_start,
)
from logitmix.commands.train import build_trainer, evaluation
from logitmix.evaluation.decode import greedy_responses, members_of
from logitmix.evaluation.metrics import Rates, rates_by
from logitmix.members import load_member
from logitmix.modeling import LogitMixForCausalLM
from logitmix.report.figures import plot_curves, plot_sweep
from logitmix.report.tables import print_rates, print_sweep
from logitmix.tasks import Problem
from logitmix.tasks.arithmetic import Arithmetic
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.sft import sft_dataset

EOS, PAD = "<|endoftext|>", "<|pad|>"
SWEEP_ALPHAS = [i / 10 for i in range(11)]
CORPUS_SIZE = 20_000
MAX_NEW_TOKENS = 48
# On a CPU and for a tiny model: float32 throughout, nothing recomputed, nothing saved on the way
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@dataclass
class QuickstartArguments:
    """Sizes of the quickstart; the defaults take a few minutes on 2 cores."""

    output_dir: str | None = field(default=None, metadata={"help": "Default runs/quickstart-<time>."})
    seed: int = field(default=0, metadata={"help": "Seed of the data, the models and the rollouts."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the anchor in training."})
    base_steps: int = field(default=600, metadata={"help": "Steps of 64 solutions that make the base model."})
    sft_steps: int = field(default=100, metadata={"help": "Steps of 64 demonstrations that make the anchor."})
    rl_steps: int = field(default=40, metadata={"help": "Training steps of each arm."})
    questions: int = field(default=32, metadata={"help": "Questions a training step."})
    num_generations: int = field(default=8, metadata={"help": "Rollouts a question."})
    rl_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of both arms."})
    eval_limit: int = field(default=200, metadata={"help": "Test problems of every evaluation."})
    eval_every: int = field(default=4, metadata={"help": "Training steps between evaluations."})


def main(argv: Sequence[str]) -> None:
    (args,) = parse("logitmix quickstart", "From nothing to a report on a CPU.", (QuickstartArguments,), argv)
    started = time.monotonic()
    folder = Path(args.output_dir or f"runs/quickstart-{datetime.now():%Y%m%d-%H%M%S}")
    arguments = {"command": "quickstart"} | vars(args)
    check_sizes(args)
    find_checkpoint(str(folder), arguments, resume=None)
    record_start(str(folder), arguments)
    task = Arithmetic(seed=args.seed)
    problems = task.problems("test", args.eval_limit)
    tokenizer = character_tokenizer(task.alphabet)

    set_seed(args.seed)
    base = tiny_model(len(tokenizer))
    corpus, demonstrations = task.base_corpus(CORPUS_SIZE), task.demonstrations(CORPUS_SIZE)
    sft(base, corpus, folder / "base", tokenizer, "1 base model", args.base_steps, 5e-3, args.seed)
    anchor = load_member(str(folder / "base"))
    sft(anchor, demonstrations, folder / "sft", tokenizer, "2 SFT model", args.sft_steps, 1e-3, args.seed)

    sweep = sweep_alphas(folder, tokenizer, task, problems)
    mixing = rl_config(args, folder / "fixed_mixing", anchor=str(folder / "sft"), alpha=args.alpha)
    canonical = rl_config(args, folder / "grpo_kl", beta=0.01, loss_type="grpo")
    final: dict[str, Rates] = {}
    for title, start, config in (
        ("4 fixed mixing", "base", mixing),
        ("4 GRPO+KL", "sft", canonical),
    ):
        final |= train_arm(title, task, problems, str(folder / start), config, args)

    report(folder, args, sweep, final)
    console.print(
        f"Seed {args.seed}, {time.monotonic() - started:.0f} s. Everything is in {folder}: sweep.png, curves.png, "
        "results.jsonl, and a checkpoint of each model."
    )


def check_sizes(args: QuickstartArguments) -> None:
    """Refuse what would only fail minutes later."""
    for name, value in vars(args).items():
        if isinstance(value, int) and name != "seed" and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if not 0 <= args.alpha < 1:
        raise ValueError(f"alpha is {args.alpha}; training needs 0 <= alpha < 1")


def character_tokenizer(alphabet: str) -> Qwen2Tokenizer:
    """A tokenizer with one token a character of the (ASCII) alphabet, EOS and padding.

    A Qwen2 tokenizer without merges, since `AutoTokenizer` loads that class beside a Qwen2 model whatever was saved.
    """
    symbols = bytes_to_unicode()
    tokens = [EOS, PAD, *(symbols[ord(character)] for character in alphabet)]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        padding_side="left",
    )


def tiny_model(vocab_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 of about 0.3 million parameters."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.06,  # at transformers' 0.02 so small a model learns half as fast
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def sft(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """TRL's SFT on 64 rows a step, saved into the folder."""
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=64,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all
        adam_beta2=0.95,
        seed=seed,
        logging_steps=10,
        **QUIET,
    )
    dataset, _ = sft_dataset(rows, tokenizer, args.max_length)
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    train_watched(trainer, title)
    trainer.save_model()


def sweep_alphas(
    folder: Path, tokenizer: PreTrainedTokenizerBase, task: Arithmetic, problems: list[Problem]
) -> list[dict[str, Any]]:
    """Rates of the untrained pair at each alpha, by both schemes: table 4."""
    alphas = {f"{alpha:.1f}": alpha for alpha in SWEEP_ALPHAS}
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        row = bar.add_task("3 sweep of alpha", total=2 * len(alphas) * len(problems), info="")
        for scheme in ("logit", "prob"):
            model = LogitMixForCausalLM.from_members(str(folder / "base"), str(folder / "sft"), scheme=scheme)
            responses = graded(model, tokenizer, task, problems, alphas, progress=lambda n: bar.advance(row, n))
            rates = rates_by(responses, "alpha")
            rows += [{"scheme": scheme, "alpha": alpha} | asdict(r) for alpha, r in rates.items()]
    return rows


def rl_config(args: QuickstartArguments, folder: Path, **arm: Any) -> LogitMixGRPOConfig:
    """One update a step on all of its rollouts; the arms differ in `arm` alone."""
    return LogitMixGRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=args.questions * args.num_generations,
        num_generations=args.num_generations,
        max_steps=args.rl_steps,
        max_completion_length=MAX_NEW_TOKENS,
        learning_rate=args.rl_learning_rate,
        lr_scheduler_type="constant",
        seed=args.seed,
        logging_steps=1,
        **QUIET,
        **arm,
    )


def train_arm(
    title: str,
    task: Arithmetic,
    problems: list[Problem],
    start: str,
    config: LogitMixGRPOConfig,
    args: QuickstartArguments,
) -> dict[str, Rates]:
    """Train one arm, evaluating as it goes; the final rates of its members."""
    questions = task.problems("train", args.rl_steps * args.questions)
    trainer = build_trainer(task, questions, start, config)
    folder = Path(config.output_dir)
    train_watched(trainer, title, [EverySteps(args.eval_every, evaluation(trainer, task, problems, folder))])
    trainer.save_model()
    names = members_of(trainer.model)
    rows = graded(trainer.model, trainer.processing_class, task, problems, names)
    append_jsonl(folder / RESPONSES_FILE, rows)
    name = title.removeprefix("4 ")
    return {name if m == "model" else f"{name}: {m}": r for m, r in rates_by(rows, "name").items()}


def graded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Arithmetic,
    problems: list[Problem],
    alphas: Mapping[str, float | None],
    progress: Any = None,
) -> list[dict[str, Any]]:
    """Greedy responses, as lines of a file."""
    responses = greedy_responses(model, tokenizer, task, problems, alphas, MAX_NEW_TOKENS, progress=progress)
    return [asdict(response) for response in responses]


def report(folder: Path, args: QuickstartArguments, sweep: list[dict[str, Any]], final: dict[str, Rates]) -> None:
    """The table, the figures and the numbers."""
    names = tuple(Rates.__dataclass_fields__)
    untrained = {
        row["alpha"]: Rates(**{name: row[name] for name in names}) for row in sweep if row["scheme"] == "logit"
    }
    best = max(untrained, key=lambda alpha: untrained[alpha].answer)
    rates = {
        "base": untrained[0.0],
        "SFT (anchor)": untrained[1.0],
        f"untrained, best alpha {best:.1f}": untrained[best],
    }
    rates |= final

    print_sweep(f"Mixing the untrained pair, {args.eval_limit} test problems", sweep)
    rollouts = args.rl_steps * args.questions * args.num_generations
    print_rates(
        f"Before and after {args.rl_steps} steps, {rollouts} rollouts an arm, {args.eval_limit} test problems", rates
    )
    plot_sweep(sweep, "Mixing the untrained base with its SFT model", folder / "sweep.png")
    curves = {}
    for label, run, name in (
        (f"fixed mixing, alpha {args.alpha:g}: mixture", "fixed_mixing", "mixture"),
        ("fixed mixing: policy alone", "fixed_mixing", "policy"),
        ("GRPO+KL, beta 0.01", "grpo_kl", "model"),
        ("SFT (the anchor)", "fixed_mixing", "anchor"),
    ):
        points = [row for row in read_jsonl(folder / run / EVALUATIONS_FILE) if row["name"] == name]
        curves[label] = [(row["step"], row["answer"]) for row in points]
    plot_curves(curves, "Training from the same pair, with the same rollouts", folder / "curves.png")
    with (folder / "results.jsonl").open("w") as file:
        for row in sweep:
            file.write(json.dumps({"what": "sweep", "seed": args.seed} | row) + "\n")
        for label, r in rates.items():
            file.write(json.dumps({"what": "final", "seed": args.seed, "name": label} | asdict(r)) + "\n")
