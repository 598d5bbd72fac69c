"""`logitmix sft`: make an anchor from a task's demonstrations."""

from collections.abc import Sequence

from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from logitmix.commands.arguments import ModelArguments, TaskArguments, parse
from logitmix.commands.callbacks import run_training
from logitmix.commands.runs import claim_folder, console
from logitmix.members import load_member
from logitmix.training.sft import sft_dataset


def main(argv: Sequence[str]) -> None:
    task_args, model_args, args = parse(
        "logitmix sft",
        "Make an anchor from a task's demonstrations.",
        (TaskArguments, ModelArguments, SFTConfig),
        argv,
    )
    task = task_args.load(args.seed)
    rows = task.demonstrations(task_args.train_limit)
    model = load_member(model_args.model_name_or_path, **model_args.init_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    dataset, dropped = sft_dataset(rows, tokenizer, args.max_length)
    if dropped:
        console.print(f"Left out {dropped} of {len(rows)} demonstrations longer than max_length {args.max_length}.")
    checkpoint = claim_folder(
        args.output_dir,
        {"command": "sft"} | vars(task_args) | vars(model_args) | args.to_dict(),
        args.resume_from_checkpoint,
    )
    args.disable_tqdm = True
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    run_training(trainer, f"sft on {task.name}", checkpoint, "sft", argv)
    console.print(f"The anchor is in {args.output_dir}.")
