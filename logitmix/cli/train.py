"""`logitmix train`: GRPO of the mixture of a policy and a frozen anchor, or of one model without `--anchor`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from transformers import TrainerCallback

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.dry_run import dry_run_train
from logitmix.cli.options.evaluation import EvaluationArguments
from logitmix.cli.options.lora import AdapterArguments, print_shared_memory
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import parse
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.evaluation.decode import BATCH_SIZE, greedy_responses, members_of
from logitmix.evaluation.metrics import rates_by
from logitmix.paper.outcomes import packed_outcomes
from logitmix.paper.recipes import SFT, load_recipe
from logitmix.runs.callbacks import CompletionsFile, EverySteps, run_training
from logitmix.runs.files import EVALUATIONS_FILE
from logitmix.runs.folder import append_jsonl, console, find_checkpoint
from logitmix.runs.trackers import log_to_trackers, validate_trackers
from logitmix.tasks import Problem, Task
from logitmix.training.alpha.controllers import VALIDATING
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.task_trainer import build_trainer, split_validation


class TrainOptions(NamedTuple):
    """The options of a training run."""

    recipe: RecipeArguments
    task: TaskArguments
    model: ModelArguments
    lora: AdapterArguments
    evaluation: EvaluationArguments
    trainer: LogitMixGRPOConfig


GROUPS = tuple(TrainOptions.__annotations__.values())


def parse_train(argv: Sequence[str]) -> TrainOptions:
    """The options that flags, a config file and a recipe set."""
    description = "GRPO of the mixture of a policy (--model_name_or_path) and a frozen anchor (--anchor)."
    return TrainOptions(*parse("logitmix train", description, GROUPS, argv))


def main(argv: Sequence[str]) -> None:
    options = parse_train(argv)
    validate(options)
    if options.recipe.dry_run:
        dry_run_train(*options)
    else:
        run(options, ["logitmix", "train", *argv])


def validate(options: TrainOptions) -> None:
    """Raise `ValueError` for options of the evaluation that the trainer's own would contradict."""
    controller, source = options.trainer.alpha_controller, options.evaluation.validation_source
    if options.trainer.eval_strategy != "no":
        raise ValueError("eval_strategy evaluates by sampling, in TRL; for greedy evaluations use --eval_every STEPS")
    if source != "held_out" and controller not in VALIDATING:
        raise ValueError(
            f"validation_source is {source!r}, but alpha_controller {controller!r} validates nothing; set "
            "--alpha_controller adaptive, or --validation_source held_out"
        )


def run(options: TrainOptions, command: Sequence[str]) -> None:
    """Train, evaluate and save. `command` is what the user typed, to be repeated after an interruption.

    Raises `ValueError` for options that do not fit the model, the task or the run that is in the folder.
    """
    recipe_args, task_args, model_args, adapter_args, eval_args, args = options
    validate_trackers(args.report_to)
    validate_sft_stage(recipe_args.recipe, (model_args.model_name_or_path, args.anchor))
    peft_config = adapter_args.peft_config
    arguments = {"command": "train", "recipe": recipe_args.recipe}
    arguments |= vars(task_args) | vars(model_args) | vars(adapter_args) | vars(eval_args) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)
    task = task_args.load()
    args.model_init_kwargs = model_args.init_kwargs | (args.model_init_kwargs or {})
    args.disable_tqdm = True
    if args.stop_strings is None and task.template.stop:
        args.stop_strings = list(task.template.stop)
    holds_out = eval_args.validation_source == "held_out" and args.alpha_controller in VALIDATING
    problems, validation_problems = split_validation(
        task, task_args.train_limit, args.validation_size if holds_out else 0
    )
    trainer = build_trainer(task, problems, model_args.model_name_or_path, args, validation_problems, peft_config)
    if trainer.is_world_process_zero():
        print_shared_memory(trainer.model)
    data = {"train": problems, "validation": validation_problems}
    callbacks: list[TrainerCallback] = [CompletionsFile(trainer, eval_args.num_completions_to_save)]
    if eval_args.eval_every:
        data["test"] = task.problems("test", task_args.eval_limit)
        evaluate = member_evaluation(trainer, task, data["test"], Path(args.output_dir))
        callbacks.append(EverySteps(eval_args.eval_every, evaluate))
    run_training(trainer, command, f"train on {task.name}", arguments, checkpoint, callbacks, data)
    console.print(f"The {'mixture' if 'mixture' in members_of(trainer.model) else 'model'} is in {args.output_dir}.")


def validate_sft_stage(recipe: str | None, models: Sequence[str | None]) -> None:
    """Raise `ValueError` where one of the models is the output of the recipe's SFT stage, which has not been run."""
    if recipe is None:
        return
    stage = f"{recipe.rpartition('/')[0]}/{SFT}"
    sft_folder = load_recipe(stage).values["output_dir"].value
    if sft_folder in models and not Path(sft_folder).exists():
        raise ValueError(
            f"there is no SFT model in {sft_folder} yet; make it with `logitmix sft --recipe {stage}`, or give your "
            "own in place of the recipe's"
        )


def member_evaluation(
    trainer: LogitMixGRPOTrainer, task: Task, problems: Sequence[Problem], folder: Path
) -> Callable[[int], None]:
    """A function of the step that evaluates policy, anchor and mixture, or a model without an anchor.

    It appends to the run's `evaluations.jsonl` their rates and which problems each answered correctly
    (`logitmix.paper.outcomes.unpack`). Processes share the problems. Each decodes equally many, as sharded weights
    are gathered in step, and repeated problems count once. The anchor is frozen, so it is decoded once.
    """
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = math.ceil(len(problems) / processes)
    own = [problems[(rank + i * processes) % len(problems)] for i in range(share)]
    batch_size = trainer.args.rollout_batch_size or BATCH_SIZE
    anchor: list[dict] = []

    def evaluate(step: int) -> None:
        names = {name: alpha for name, alpha in members_of(trainer.model).items() if name != "anchor" or not anchor}
        with trainer.generation_model() as model:
            responses = greedy_responses(
                model, trainer.processing_class, task, own, names, trainer.max_completion_length, batch_size
            )
        numbered = [asdict(r) | {"problem": rank + r.problem * processes} for r in responses]
        rows = gather_object([row for row in numbered if row["problem"] < len(problems)])
        anchor.extend(row for row in rows if row["name"] == "anchor")
        rows = [row for row in rows if row["name"] != "anchor"] + anchor
        if trainer.is_world_process_zero():
            rates = {name: asdict(r) for name, r in rates_by(rows, "name").items()}
            lines = [
                {"step": step, "name": name} | r | packed_outcomes(row for row in rows if row["name"] == name)
                for name, r in rates.items()
            ]
            append_jsonl(folder / EVALUATIONS_FILE, lines)
            log_to_trackers(trainer, rates)

    return evaluate
