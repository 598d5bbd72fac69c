"""`logitmix train`: GRPO of the mixture of a policy and a frozen anchor, or of a model alone, without `--anchor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.described import described
from logitmix.cli.options.evaluation import EvaluationArguments
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.model import ModelArguments, find_model
from logitmix.cli.options.parser import Validated, flatten, parse
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.paper.recipes import SFT, load_recipe
from logitmix.runs.console import console
from logitmix.training.alpha.controllers import VALIDATING, validate_alpha

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from logitmix.training.config import LogitMixGRPOConfig
else:  # the flags of the configuration, which takes seconds to import; the options hold the configuration itself
    LogitMixGRPOConfig = described("LogitMixGRPOConfig")


@dataclass
class TrainOptions(Validated):
    recipe: RecipeArguments
    task: TaskArguments
    model: ModelArguments
    adapter: AdapterArguments
    evaluation: EvaluationArguments
    training: LogitMixGRPOConfig

    def validate(self) -> None:
        """Raise `ValueError` for options that contradict each other."""
        source, controller = self.evaluation.validation_source, self.training.alpha_controller
        if self.training.eval_strategy != "no":
            raise ValueError(
                "TRL's eval_strategy evaluates by sampling; for greedy evaluations use --eval_every STEPS"
            )
        if source != "held_out" and controller not in VALIDATING:
            raise ValueError(
                f"validation_source is {source!r}, but alpha_controller {controller!r} validates nothing; set "
                "--alpha_controller adaptive, or --validation_source held_out"
            )
        validate_alpha(self.training.alpha)


def parse_train(argv: Sequence[str]) -> TrainOptions:
    description = "Train the mixture of a policy (--model_name_or_path) and a frozen anchor (--anchor) with GRPO."
    return parse("train", description, TrainOptions, argv)


def main(argv: Sequence[str]) -> None:
    run(parse_train(argv), ["logitmix", "train", *argv])


def run(options: TrainOptions, command: Sequence[str]) -> None:
    """Train, with `command` as the command line that is printed to continue the run when it is stopped."""
    from logitmix.cli.options.dry_run import dry_run_train
    from logitmix.evaluation.during_training import evaluate_members
    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.runs.callbacks import CompletionsFile, EverySteps
    from logitmix.runs.folder import find_checkpoint
    from logitmix.runs.trackers import validate_trackers
    from logitmix.runs.training import run_training
    from logitmix.training.task_trainer import build_trainer, split_validation

    task_args, model_args, eval_args, args = options.task, options.model, options.evaluation, options.training
    if args.anchor is not None:
        args.anchor = find_model(args.anchor)
    if options.recipe.dry_run:
        dry_run_train(options.recipe, task_args, model_args, options.adapter, eval_args, args)
        return
    validate_trackers(args.report_to)
    validate_recipe_anchor(options.recipe.recipe, (model_args.model_name_or_path, args.anchor))
    peft_config = options.adapter.peft_config
    arguments = {"command": "train", "recipe": options.recipe.recipe}
    arguments |= flatten(task_args, model_args, options.adapter, eval_args) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)

    task = task_args.load()
    args.model_init_kwargs = model_args.with_init_kwargs(args.model_init_kwargs)
    args.disable_tqdm = True
    if args.stop_strings is None and task.template.stop:
        args.stop_strings = list(task.template.stop)
    held_out = eval_args.validation_source == "held_out" and args.alpha_controller in VALIDATING
    size = args.validation_size if held_out else 0
    problems, validation_problems = split_validation(task, task_args.train_limit, size)
    trainer = build_trainer(task, problems, model_args.model_name_or_path, args, validation_problems, peft_config)
    if trainer.is_world_process_zero():
        print_saved_memory(trainer.model)
    data = {"train": problems, "validation": validation_problems}
    callbacks: list[TrainerCallback] = [CompletionsFile(trainer, eval_args.num_completions_to_save)]
    if eval_args.eval_every:
        data["test"] = task.problems("test", task_args.eval_limit)
        evaluate = evaluate_members(trainer, task, data["test"], Path(args.output_dir))
        callbacks.append(EverySteps(eval_args.eval_every, evaluate))
    run_training(trainer, command, f"train on {task.name}", arguments, checkpoint, callbacks, data)
    console.print(
        f"The {'mixture' if isinstance(trainer.model, LogitMixForCausalLM) else 'model'} is in {args.output_dir}."
    )


def validate_recipe_anchor(recipe: str | None, models: Sequence[str | None]) -> None:
    """Raise `ValueError` if one of the models is the SFT model of the recipe's cell, and it has not been made yet."""
    if recipe is None:
        return
    stage = f"{recipe.rpartition('/')[0]}/{SFT}"
    made = load_recipe(stage).values["output_dir"].value
    if made in models and not Path(made).exists():
        raise ValueError(
            f"there is no SFT model in {made} yet; make it with `logitmix sft --recipe {stage}`, or pass your "
            "own with --anchor or --model_name_or_path"
        )


def print_saved_memory(model: "PreTrainedModel") -> None:
    """Print the memory that members take which share one base or are quantised; nothing if none are."""
    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.mixture.quantization import num_bytes

    if isinstance(model, LogitMixForCausalLM) and model.anchors != model.members[1:]:
        held, saved = model.weight_bytes()
        console.print(f"Members share one base: weights take {held / 1e9:.3g} GB, not {(held + saved) / 1e9:.3g} GB.")
    if isinstance(model, LogitMixForCausalLM):
        for name in model.config.quantized_models:
            size = sum(map(num_bytes, getattr(model, name).parameters()))
            console.print(
                f"{name} is quantised, in {size / 1e9:.3g} GB. `logitmix check-quantization` compares it with the "
                "original on the task's questions.",
                soft_wrap=True,
            )
