"""`logitmix sft`: make an anchor from a task's demonstrations."""

from collections.abc import Sequence
from typing import NamedTuple

from trl import SFTConfig

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.dry_run import dry_run_sft
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import parse
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.mixture.adapters import read_adapter_config, validate_adapter_targets
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.runs.callbacks import run_training
from logitmix.runs.folder import console, find_checkpoint
from logitmix.runs.trackers import validate_trackers
from logitmix.training.sft import ResumableSFTTrainer, sft_dataset


class SFTOptions(NamedTuple):
    """The options of a fine-tuning run."""

    recipe: RecipeArguments
    task: TaskArguments
    model: ModelArguments
    lora: AdapterArguments
    trainer: SFTConfig


GROUPS = tuple(SFTOptions.__annotations__.values())


def parse_sft(argv: Sequence[str]) -> SFTOptions:
    """The options that flags, a config file and a recipe set."""
    return SFTOptions(*parse("logitmix sft", "Make an anchor from a task's demonstrations.", GROUPS, argv))


def main(argv: Sequence[str]) -> None:
    options = parse_sft(argv)
    if options.recipe.dry_run:
        dry_run_sft(*options)
    else:
        run(options, ["logitmix", "sft", *argv])


def run(options: SFTOptions, command: Sequence[str]) -> None:
    """Fine-tune and save. `command` is what the user typed, to be repeated after an interruption.

    Raises `ValueError` for options that do not fit the model, the task or the run that is in the folder.
    """
    recipe_args, task_args, model_args, adapter_args, args = options
    validate_trackers(args.report_to)
    peft_config = adapter_args.peft_config
    arguments = {"command": "sft", "recipe": recipe_args.recipe}
    arguments |= vars(task_args) | vars(model_args) | vars(adapter_args) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)
    task = task_args.load()
    rows = task.demonstrations(task_args.train_limit)
    if peft_config is not None and read_adapter_config(model_args.model_name_or_path) is not None:
        raise ValueError(
            f"{model_args.model_name_or_path} is an adapter already, and --use_peft asks for a new one; merge it "
            "first, with logitmix export --merge"
        )
    model = load_member(model_args.model_name_or_path, **model_args.init_kwargs)
    if isinstance(model, LogitMixForCausalLM):
        raise ValueError(f"{model_args.model_name_or_path} is a mixture; SFT makes an anchor from a single model")
    if peft_config is not None:
        validate_adapter_targets(model, peft_config)
    tokenizer = require_tokenizer(model_args.model_name_or_path)
    dataset, dropped = sft_dataset(rows, tokenizer, args.max_length)
    if dropped:
        console.print(f"Left out {dropped} of {len(rows)} demonstrations longer than max_length {args.max_length}.")
    args.disable_tqdm = True
    trainer = ResumableSFTTrainer(
        model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    run_training(trainer, command, f"sft on {task.name}", arguments, checkpoint, data={"train": rows})
    console.print(f"The anchor is in {args.output_dir}.")
