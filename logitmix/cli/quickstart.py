"""`logitmix quickstart`: the paper's story at toy size, from nothing to a report, on a CPU and without downloads.

1. A small Qwen2 learns arithmetic from worked solutions that reason well and rarely keep the format: the base.
2. Demonstrations that keep the format and leap over the steps turn a copy of it into the anchor: the SFT model.
3. The untrained pair is mixed at each alpha, by both schemes (the paper's table 4).
4. Arms train with the same rollouts: by default the mixture from the base, and GRPO with a KL penalty from the SFT
   model; with `--arms all` every arm of the paper. They are the recipes of the cell `arithmetic/tiny`.
5. One table, two figures, and every number as JSON lines.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from logitmix.cli import sft, train
from logitmix.cli.options.parser import build, parse
from logitmix.evaluation.decode import greedy_responses, members_of
from logitmix.evaluation.metrics import Rates, rates_by
from logitmix.evaluation.report.figures import plot_curves, plot_sweep
from logitmix.evaluation.report.tables import print_rates, print_sweep
from logitmix.mixture.loading import load_member
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.recipes import TITLES, load_recipe
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.runs.callbacks import EverySteps, train_with_progress
from logitmix.runs.files import EVALUATIONS_FILE, RESPONSES_FILE, read_jsonl
from logitmix.runs.folder import append_jsonl, console, find_checkpoint, progress_bar, record_start
from logitmix.tasks import Problem
from logitmix.tasks.arithmetic import Arithmetic
from logitmix.tasks.names import unknown_name
from logitmix.training.alpha.controllers import VALIDATING
from logitmix.training.sft import ResumableSFTTrainer, sft_dataset
from logitmix.training.task_trainer import build_trainer, split_validation

SWEEP_ALPHAS = [i / 10 for i in range(11)]
CORPUS_SIZE = 20_000
MAX_NEW_TOKENS = 48
CELL = "arithmetic/tiny"


@dataclass
class QuickstartArguments:
    """Sizes of the quickstart; the defaults take a few minutes on 2 cores."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder of the run."})
    arms: list[str] = field(
        default_factory=lambda: ["fixed_mixing", "grpo_kl"],
        metadata={"help": f"Arms to train, or all: {', '.join(TITLES)}."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data, the models and the rollouts."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the anchor in training."})
    base_steps: int = field(default=600, metadata={"help": "Steps of 64 solutions that train the base model."})
    sft_steps: int = field(default=100, metadata={"help": "Steps of 64 demonstrations that train the anchor."})
    rl_steps: int = field(default=40, metadata={"help": "Training steps of each arm."})
    questions: int = field(default=32, metadata={"help": "Questions per training step."})
    num_generations: int = field(default=8, metadata={"help": "Rollouts per question."})
    rl_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of every arm."})
    eval_limit: int = field(default=200, metadata={"help": "Test problems of each evaluation."})
    eval_every: int = field(default=4, metadata={"help": "Training steps between evaluations."})

    def __post_init__(self) -> None:
        """Refuse at once what would otherwise fail minutes later."""
        for name, value in vars(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; training needs 0 <= alpha < 1")
        self.arms = list(TITLES) if self.arms == ["all"] else list(dict.fromkeys(self.arms))
        for arm in self.arms:
            if arm not in TITLES:
                raise unknown_name("arm", arm, TITLES)


def main(argv: Sequence[str]) -> None:
    (args,) = parse("logitmix quickstart", "From nothing to a report, on a CPU.", (QuickstartArguments,), argv)
    started = time.monotonic()
    folder = Path(args.output_dir)
    arguments = {"command": "quickstart"} | vars(args)
    find_checkpoint(str(folder), arguments, resume=None)
    record_start(str(folder), arguments)
    task = Arithmetic(seed=args.seed)
    problems = task.problems("test", args.eval_limit)

    tokenizer = make_base(task, folder / "base", args.seed, args.base_steps, "1 base model")
    anchor = load_member(str(folder / "base"))
    demonstrations = task.demonstrations(CORPUS_SIZE)
    fine_tune(anchor, demonstrations, folder / "sft", tokenizer, "2 SFT model", args.sft_steps, 1e-3, args.seed)

    sweep = sweep_alphas(folder, tokenizer, task, problems)
    final: dict[str, Rates] = {}
    for arm in args.arms:
        final |= train_arm(arm, task, problems, folder, args)

    report(folder, args, sweep, final)
    console.print(
        f"Seed {args.seed}, {time.monotonic() - started:.0f} s. Everything is in {folder}: sweep.png, curves.png, "
        "results.jsonl, and a checkpoint of each model."
    )


def make_base(
    task: Arithmetic, folder: Path, seed: int, steps: int, title: str = "base model"
) -> PreTrainedTokenizerBase:
    """Train the base model and return its tokenizer. The seed sets the first weights and the corpus's order."""
    shutil.rmtree(folder, ignore_errors=True)  # left by an interruption
    tokenizer = character_tokenizer(task.alphabet)
    set_seed(seed)
    model = tiny_model(len(tokenizer))
    fine_tune(model, task.base_corpus(CORPUS_SIZE), folder, tokenizer, title, steps, 5e-3, seed)
    return tokenizer


def fine_tune(
    model: PreTrainedModel,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train the model on 64 rows a step, under the recipe of the cell's SFT stage, and save it into the folder."""
    values = {"output_dir": folder, "max_steps": steps, "learning_rate": learning_rate, "seed": seed}
    args = sft.SFTOptions(*build(sft.GROUPS, f"{CELL}/sft", values)).trainer
    args.disable_tqdm = True
    dataset, _ = sft_dataset(rows, tokenizer, args.max_length)
    trainer = ResumableSFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    train_with_progress(trainer, title)
    trainer.save_model()


def sweep_alphas(
    folder: Path, tokenizer: PreTrainedTokenizerBase, task: Arithmetic, problems: list[Problem]
) -> list[dict[str, Any]]:
    """Rates of the untrained pair at each alpha, by both schemes: the paper's table 4."""
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


def arm_options(arm: str, folder: Path, args: QuickstartArguments) -> train.TrainOptions:
    """The options of an arm: those of its recipe, with this run's models and sizes."""
    recipe, stage = load_recipe(f"{CELL}/{arm}").values, load_recipe(f"{CELL}/sft").values
    folders = {stage["model_name_or_path"].value: folder / "base", stage["output_dir"].value: folder / "sft"}
    models = {key: recipe[key].value for key in ("model_name_or_path", "anchor") if key in recipe}
    values: dict[str, Any] = {key: folders[path] for key, path in models.items() if path in folders}
    values |= {
        "output_dir": folder / arm,
        "per_device_train_batch_size": args.questions * args.num_generations,
        "num_generations": args.num_generations,
        "max_steps": args.rl_steps,
        "learning_rate": args.rl_learning_rate,
        "seed": args.seed,
    }
    if "alpha" in recipe:
        values["alpha"] = args.alpha
    return train.TrainOptions(*build(train.GROUPS, f"{CELL}/{arm}", values))


def train_arm(
    arm: str, task: Arithmetic, problems: list[Problem], folder: Path, args: QuickstartArguments
) -> dict[str, Rates]:
    """Train one arm, evaluating as it goes; returns the final rates of its members."""
    options = arm_options(arm, folder, args)
    config = options.trainer
    config.disable_tqdm = True
    size = config.validation_size if config.alpha_controller in VALIDATING else 0
    questions, validation = split_validation(task, args.rl_steps * args.questions, size)
    trainer = build_trainer(task, questions, options.model.model_name_or_path, config, validation)
    evaluate = EverySteps(args.eval_every, train.member_evaluation(trainer, task, problems, folder / arm))
    train_with_progress(trainer, f"4 {TITLES[arm]}", [evaluate])
    trainer.save_model()
    names = members_of(trainer.model)
    rows = graded(trainer.model, trainer.processing_class, task, problems, names)
    append_jsonl(folder / arm / RESPONSES_FILE, rows)
    return {TITLES[arm] if m == "model" else f"{TITLES[arm]}: {m}": r for m, r in rates_by(rows, "name").items()}


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
    """Print the tables, draw the figures, and write the numbers."""
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
    plot_curves(
        curves(folder, args, rates["SFT (anchor)"].answer),
        "Training from the same pair, with the same rollouts",
        folder / "curves.png",
    )
    with (folder / "results.jsonl").open("w") as file:
        for row in sweep:
            file.write(json.dumps({"what": "sweep", "seed": args.seed} | row) + "\n")
        for label, r in rates.items():
            file.write(json.dumps({"what": "final", "seed": args.seed, "name": label} | asdict(r)) + "\n")


def curves(folder: Path, args: QuickstartArguments, sft_answer: float) -> dict[str, list[tuple[int, float]]]:
    """Answer rate by step, of what each arm trains (a mixture, or the model) and of the SFT model."""
    labels = {
        "fixed_mixing": f"fixed mixing, alpha {args.alpha:g}: mixture",
        "grpo_kl": "GRPO+KL, beta 0.01",
    }
    lines: dict[str, list[tuple[int, float]]] = {}
    for arm in args.arms:
        points: dict[str, list[tuple[int, float]]] = {}
        for row in read_jsonl(folder / arm / EVALUATIONS_FILE):
            points.setdefault(row["name"], []).append((row["step"], row["answer"]))
        lines[labels.get(arm, TITLES[arm])] = points["mixture" if "mixture" in points else "model"]
        if arm == "fixed_mixing":
            lines["fixed mixing: policy alone"] = points["policy"]
    steps = [step for step, _ in next(iter(lines.values()))]
    return lines | {"SFT (the anchor)": [(step, sft_answer) for step in steps]}
