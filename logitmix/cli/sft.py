"""`logitmix sft`: supervised fine-tuning of an anchor on a task's demonstrations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from logitmix.cli.options.data import CHAT_TEMPLATE_HELP, TaskArguments, parse_chat_template_kwargs
from logitmix.cli.options.described import described
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import flatten, parse
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.runs.console import console
from logitmix.tasks.base import Demonstrated

if TYPE_CHECKING:
    from logitmix.training.sft import ResumableSFTConfig
else:  # the flags of the configuration, which takes seconds to import; the options hold the configuration itself
    ResumableSFTConfig = described("ResumableSFTConfig")


@dataclass
class DemonstrationArguments:
    """Demonstrations"""

    demonstrate: Demonstrated = field(
        default="solution",
        metadata={
            "help": "What a response shows: solution, the worked solution and then the answer; or answer, the answer "
            "alone, for data without solutions."
        },
    )
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_HELP})

    def __post_init__(self) -> None:
        self.chat_template_kwargs = parse_chat_template_kwargs(self.chat_template_kwargs)


@dataclass
class SFTOptions:
    recipe: RecipeArguments
    task: TaskArguments
    demonstrations: DemonstrationArguments
    model: ModelArguments
    adapter: AdapterArguments
    training: ResumableSFTConfig


def parse_sft(argv: Sequence[str]) -> SFTOptions:
    return parse("sft", "Fine-tune a model on a task's demonstrations, to make an anchor.", SFTOptions, argv)


def main(argv: Sequence[str]) -> None:
    run(parse_sft(argv), ["logitmix", "sft", *argv])


def run(options: SFTOptions, command: Sequence[str]) -> None:
    """Train, with `command` as the command line that is printed to continue the run when it is stopped."""
    from logitmix.cli.options.dry_run import dry_run_sft
    from logitmix.mixture.adapters import read_adapter_config, validate_adapter_targets
    from logitmix.mixture.loading import load_member, require_tokenizer
    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.mixture.tokenizers import prepare_for_task
    from logitmix.runs.folder import find_checkpoint
    from logitmix.runs.trackers import validate_trackers
    from logitmix.runs.training import run_training
    from logitmix.training.sft import ResumableSFTTrainer, sft_dataset

    task_args, model_args, args = options.task, options.model, options.training
    if options.recipe.dry_run:
        dry_run_sft(options.recipe, task_args, model_args, options.adapter, args)
        return
    validate_trackers(args.report_to)
    peft_config = options.adapter.peft_config
    arguments = {"command": "sft", "recipe": options.recipe.recipe}
    arguments |= flatten(task_args, options.demonstrations, model_args, options.adapter) | args.to_dict()
    checkpoint = find_checkpoint(args.output_dir, arguments, args.resume_from_checkpoint)

    task = task_args.load()
    assert not isinstance(options.demonstrations.chat_template_kwargs, str)
    task.chat_template_kwargs = options.demonstrations.chat_template_kwargs or {}
    rows = task.demonstrations(task_args.train_limit, options.demonstrations.demonstrate)
    source = model_args.model_name_or_path
    if peft_config is not None and read_adapter_config(source) is not None:
        raise ValueError(
            f"{source} is an adapter already, and --use_peft would add another; merge it first, with logitmix export "
            "--merge"
        )
    model = load_member(source, **model_args.init_kwargs, trust_remote_code=args.trust_remote_code)
    if isinstance(model, LogitMixForCausalLM):
        raise ValueError(f"{source} is a mixture; SFT makes an anchor from a single model")
    if peft_config is not None:
        validate_adapter_targets(model, peft_config)
    tokenizer = require_tokenizer(source, trust_remote_code=args.trust_remote_code)
    prepare_for_task(tokenizer, task, task.problems("train", task_args.train_limit))
    dataset, dropped = sft_dataset(rows, tokenizer, args.max_length)
    if dropped:
        console.print(f"Left out {dropped} of {len(rows)} demonstrations longer than max_length {args.max_length}.")
    args.disable_tqdm = True
    trainer = ResumableSFTTrainer(
        model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    run_training(trainer, command, f"sft on {task.name}", arguments, checkpoint, data={"train": rows})
    console.print(f"The anchor is in {args.output_dir}.")
