"""`logitmix train`: GRPO of the mixture of a policy and a frozen anchor (or of a model alone, without `--anchor`)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from peft import PeftConfig
from transformers import TrainerCallback

from logitmix.cli.options.dry_run import dry_run_train
from logitmix.cli.options.lora import AdapterArguments, say_what_is_shared
from logitmix.cli.options.parser import EvaluationArguments, ModelArguments, RecipeArguments, TaskArguments, parse
from logitmix.evaluation.decode import BATCH_SIZE, greedy_responses, members_of
from logitmix.evaluation.metrics import rates_by
from logitmix.mixture.generation import validate_chat_template
from logitmix.mixture.loading import require_tokenizer
from logitmix.paper.outcomes import packed_outcomes
from logitmix.paper.recipes import SFT, load_recipe
from logitmix.runs.callbacks import CompletionsFile, EverySteps, run_training
from logitmix.runs.files import EVALUATIONS_FILE
from logitmix.runs.folder import append_jsonl, console, find_checkpoint
from logitmix.runs.trackers import require_trackers, tell_trackers
from logitmix.tasks import Problem, Task
from logitmix.training.alpha.controllers import VALIDATING
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.rewards import TaskReward, grpo_dataset


def parse_train(
    argv: Sequence[str],
) -> tuple[RecipeArguments, TaskArguments, ModelArguments, AdapterArguments, EvaluationArguments, LogitMixGRPOConfig]:
    """What the flags, a config file and a recipe ask for."""
    return parse(  # type: ignore[return-value]
        "logitmix train",
        "GRPO of the mixture of a policy (--model_name_or_path) and a frozen anchor (--anchor).",
        (RecipeArguments, TaskArguments, ModelArguments, AdapterArguments, EvaluationArguments, LogitMixGRPOConfig),
        argv,
    )


def main(argv: Sequence[str]) -> None:
    recipe_args, task_args, model_args, adapter_args, eval_args, args = parse_train(argv)
    if args.eval_strategy != "no":
        raise ValueError("eval_strategy evaluates by sampling, in TRL; for greedy evaluations use --eval_every STEPS")
    if eval_args.validation_source != "held_out" and args.alpha_controller not in VALIDATING:
        raise ValueError(
            f"validation_source is {eval_args.validation_source!r}, but alpha_controller {args.alpha_controller!r} "
            "validates nothing; set --alpha_controller adaptive, or --validation_source held_out"
        )
    if recipe_args.dry_run:
        dry_run_train(recipe_args, task_args, model_args, adapter_args, eval_args, args)
        return
    require_trackers(args.report_to)
    require_recipes_anchor(recipe_args.recipe, (model_args.model_name_or_path, args.anchor))
    peft_config = adapter_args.peft_config
    arguments = {"command": "train", "recipe": recipe_args.recipe}
    arguments |= vars(task_args) | vars(model_args) | vars(adapter_args) | vars(eval_args) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)
    task = task_args.load()
    args.model_init_kwargs = model_args.init_kwargs | (args.model_init_kwargs or {})
    args.disable_tqdm = True
    if args.stop_strings is None and task.template.stop:
        args.stop_strings = list(task.template.stop)
    held_out = eval_args.validation_source == "held_out" and args.alpha_controller in VALIDATING
    size = args.validation_size if held_out else 0
    problems, validation_problems = hold_out(task, task_args.train_limit, size)
    trainer = build_trainer(task, problems, model_args.model_name_or_path, args, validation_problems, peft_config)
    if trainer.is_world_process_zero():
        say_what_is_shared(trainer.model)
    data = {"train": problems, "validation": validation_problems}
    callbacks: list[TrainerCallback] = [CompletionsFile(trainer, eval_args.num_completions_to_save)]
    if eval_args.eval_every:
        data["test"] = task.problems("test", task_args.eval_limit)
        evaluate = evaluation(trainer, task, data["test"], Path(args.output_dir))
        callbacks.append(EverySteps(eval_args.eval_every, evaluate))
    run_training(trainer, argv, f"train on {task.name}", arguments, checkpoint, callbacks, data)
    console.print(f"The {'mixture' if 'mixture' in members_of(trainer.model) else 'model'} is in {args.output_dir}.")


def require_recipes_anchor(recipe: str | None, models: Sequence[str | None]) -> None:
    """Raise `ValueError` where one of the models is what the recipe's SFT stage makes, and that has not been run."""
    if recipe is None:
        return
    stage = f"{recipe.rpartition('/')[0]}/{SFT}"
    made = load_recipe(stage).values["output_dir"].value
    if made in models and not Path(made).exists():
        raise ValueError(
            f"there is no SFT model in {made} yet; make it with `logitmix sft --recipe {stage}`, or give your own in "
            "place of the recipe's"
        )


def hold_out(task: Task, limit: int | None, size: int) -> tuple[list[Problem], list[Problem]]:
    """The first `limit` training problems (None: all but the others), and `size` that come after them.

    Raises `ValueError` where the train split has no more than `size`.
    """
    problems = task.problems("train", None if limit is None else limit + size)
    if len(problems) <= size:
        raise ValueError(
            f"validation_size is {size}, but {task.name} has {len(problems)} training problems, so that none would be "
            "left to train on; lower validation_size"
        )
    return problems[: len(problems) - size], problems[len(problems) - size :]


def build_trainer(
    task: Task,
    problems: Sequence[Problem],
    model_name_or_path: str,
    args: LogitMixGRPOConfig,
    validation_problems: Sequence[Problem] = (),
    peft_config: PeftConfig | None = None,
) -> LogitMixGRPOTrainer:
    """The trainer of one arm on a task's problems, rewarded as the paper does."""
    tokenizer = require_tokenizer(model_name_or_path, padding_side="left", truncation_side="left")
    if task.template.chat:
        validate_chat_template(tokenizer)
    return LogitMixGRPOTrainer(
        model_name_or_path,
        reward_funcs=TaskReward(task),
        args=args,
        train_dataset=grpo_dataset(task, problems),
        validation_dataset=grpo_dataset(task, validation_problems) if validation_problems else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def evaluation(
    trainer: LogitMixGRPOTrainer, task: Task, problems: Sequence[Problem], folder: Path
) -> Callable[[int], None]:
    """A function of the step that evaluates policy, anchor and mixture and appends to the run's file their rates, and
    which problems each had right (`logitmix.paper.outcomes.unpack`).

    A model without an anchor is evaluated by the same protocol. Processes share the problems; each decodes equally
    many, since sharded weights are gathered in step, and what is decoded twice counts once. The anchor is frozen, so
    it is decoded once.
    """
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = math.ceil(len(problems) / processes)
    mine = [problems[(rank + i * processes) % len(problems)] for i in range(share)]
    batch_size = trainer.args.rollout_batch_size or BATCH_SIZE
    anchor: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        names = {name: alpha for name, alpha in members_of(trainer.model).items() if name != "anchor" or not anchor}
        with trainer.generation_model() as model:
            responses = greedy_responses(
                model, trainer.processing_class, task, mine, names, trainer.max_completion_length, batch_size
            )
        own = [asdict(r) | {"problem": rank + r.problem * processes} for r in responses]
        rows = gather_object([row for row in own if row["problem"] < len(problems)])
        anchor.extend(row for row in rows if row["name"] == "anchor")
        rows = [row for row in rows if row["name"] != "anchor"] + anchor
        if trainer.is_world_process_zero():
            rates = {name: asdict(r) for name, r in rates_by(rows, "name").items()}
            lines = [
                {"step": step, "name": name} | r | packed_outcomes(row for row in rows if row["name"] == name)
                for name, r in rates.items()
            ]
            append_jsonl(folder / EVALUATIONS_FILE, lines)
            tell_trackers(trainer, rates)

    return evaluate
