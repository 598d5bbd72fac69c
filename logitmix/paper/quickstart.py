"""The quickstart: the paper's argument at toy size, from nothing to a report, on a CPU and without downloads.

1. A small Qwen2 is trained on arithmetic solutions that reason well and rarely keep the format: the base.
2. A copy is fine-tuned on demonstrations that keep the format and skip the reasoning: the SFT model, the anchor.
3. The untrained pair is mixed at every alpha, by both schemes (the paper's table 4).
4. Arms are trained with equally many rollouts: by default the mixture, starting from the base, and GRPO with a KL
   penalty, starting from the SFT model; with `arms=["all"]` every arm of the paper. They use the recipes of the cell
   `arithmetic/tiny`.
5. Results: a table, two figures, and every number as JSON lines (`paper.quickstart_report`).
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.decode import OnResponse, get_alphas, greedy_responses
from logitmix.evaluation.during_training import evaluate_members
from logitmix.evaluation.metrics import Rates, rates_by
from logitmix.evaluation.requests import Response
from logitmix.mixture.loading import load_member
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.quickstart_config import QuickstartConfig
from logitmix.paper.quickstart_report import write_report
from logitmix.paper.recipes import TINY_CELL, TITLES, configure, load_recipe
from logitmix.paper.tiny_model import character_tokenizer
from logitmix.paper.tiny_training import CORPUS_SIZE, finetune, train_base
from logitmix.runs.callbacks import EverySteps
from logitmix.runs.console import progress_bar
from logitmix.runs.files import RESPONSES_FILE, append_jsonl
from logitmix.runs.training import train_with_progress
from logitmix.tasks import Problem
from logitmix.tasks.arithmetic import Arithmetic
from logitmix.training.alpha.controllers import VALIDATING
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.task_trainer import build_trainer, split_validation

SWEEP_ALPHAS = [i / 10 for i in range(11)]
MAX_NEW_TOKENS = 48


def run_quickstart(config: QuickstartConfig) -> None:
    """Make the models, sweep alpha, train the arms, and write the report, all in `config.output_dir`."""
    folder = Path(config.output_dir)
    task = Arithmetic(seed=config.seed)
    problems = task.problems("test", config.eval_limit)
    tokenizer = character_tokenizer(task.alphabet)

    train_base(task, folder / "base", "1 base model", config.base_steps, config.seed)
    anchor, demonstrations = load_member(str(folder / "base")), task.demonstrations(CORPUS_SIZE)
    finetune(anchor, tokenizer, demonstrations, folder / "sft", "2 SFT model", config.sft_steps, 1e-3, config.seed)

    sweep = sweep_alphas(folder, tokenizer, task, problems)
    trained: dict[str, Rates] = {}
    for arm in config.arm_names:
        trained |= train_arm(arm, task, problems, config)
    write_report(config, sweep, trained)


def sweep_alphas(
    folder: Path, tokenizer: PreTrainedTokenizerBase, task: Arithmetic, problems: list[Problem]
) -> list[dict[str, Any]]:
    """A row for each scheme and alpha with the rates of the untrained pair: table 4."""
    alphas = {f"{alpha:.1f}": alpha for alpha in SWEEP_ALPHAS}
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        row = bar.add_task("3 sweep of alpha", total=2 * len(alphas) * len(problems), info="")
        for scheme in ("logit", "prob"):
            model = LogitMixForCausalLM.from_members(str(folder / "base"), str(folder / "sft"), scheme=scheme)
            responses = _greedy(model, tokenizer, task, problems, alphas, on_response=lambda *_: bar.advance(row))
            rates = rates_by(responses, "alpha")
            rows += [{"scheme": scheme, "alpha": alpha} | asdict(r) for alpha, r in rates.items()]
    return rows


def train_arm(arm: str, task: Arithmetic, problems: list[Problem], config: QuickstartConfig) -> dict[str, Rates]:
    """Train one arm with regular evaluations; return the final rates of its members, by the names of the report."""
    folder = Path(config.output_dir) / arm
    start, args = arm_config(arm, config)
    size = args.validation_size if args.alpha_controller in VALIDATING else 0
    questions, validation = split_validation(task, config.rl_steps * config.questions, size)
    trainer = build_trainer(task, questions, start, args, validation)
    evaluate = EverySteps(config.eval_every, evaluate_members(trainer, task, problems, folder))
    train_with_progress(trainer, f"4 {TITLES[arm]}", [evaluate])
    trainer.save_model()
    responses = _greedy(trainer.model, trainer.processing_class, task, problems, get_alphas(trainer.model))
    append_jsonl(folder / RESPONSES_FILE, [asdict(response) for response in responses])
    rates = rates_by(responses, "name")
    return {TITLES[arm] if name == "model" else f"{TITLES[arm]}: {name}": r for name, r in rates.items()}


def arm_config(arm: str, config: QuickstartConfig) -> tuple[str, LogitMixGRPOConfig]:
    """The model that an arm starts from and its configuration: the recipe's, with this run's models and sizes."""
    folder = Path(config.output_dir)
    recipe, sft = load_recipe(f"{TINY_CELL}/{arm}").values, load_recipe(f"{TINY_CELL}/sft").values
    made = {sft["model_name_or_path"].value: str(folder / "base"), sft["output_dir"].value: str(folder / "sft")}
    models = {key: recipe[key].value for key in ("model_name_or_path", "anchor") if key in recipe}
    changes: dict[str, Any] = {key: made[path] for key, path in models.items() if path in made}
    changes |= {
        "output_dir": str(folder / arm),
        "per_device_train_batch_size": config.questions * config.num_generations,
        "num_generations": config.num_generations,
        "max_steps": config.rl_steps,
        "learning_rate": config.rl_learning_rate,
        "seed": config.seed,
    }
    if "alpha" in recipe:
        changes["alpha"] = config.alpha
    settings = load_recipe(f"{TINY_CELL}/{arm}").settings(changes)
    args = configure(LogitMixGRPOConfig, settings)
    args.disable_tqdm = True
    return settings["model_name_or_path"], args


def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Arithmetic,
    problems: list[Problem],
    alphas: Mapping[str, float | None],
    on_response: OnResponse | None = None,
) -> list[Response]:
    return greedy_responses(model, tokenizer, task, problems, alphas, MAX_NEW_TOKENS, on_response=on_response)
