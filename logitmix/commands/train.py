"""`logitmix train`: GRPO of the mixture of a policy and a frozen anchor (or of a model alone, without `--anchor`)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import gather_object
from peft import PeftConfig
from transformers import TrainerCallback

from logitmix.commands.adapters import AdapterArguments, say_what_is_shared
from logitmix.commands.arguments import ModelArguments, TaskArguments, parse
from logitmix.commands.callbacks import CompletionsFile, EverySteps, run_training
from logitmix.commands.runs import EVALUATIONS_FILE, append_jsonl, console, find_checkpoint
from logitmix.evaluation.decode import greedy_responses, members_of
from logitmix.evaluation.metrics import rates_by
from logitmix.generation import require_chat_template
from logitmix.members import require_tokenizer
from logitmix.tasks import Problem, Task
from logitmix.training.alpha import VALIDATING
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.rewards import TaskReward, grpo_dataset


@dataclass
class EvaluationArguments:
    """What is evaluated and written down while training runs, and validation for the weight."""

    eval_every: int | None = field(
        default=None, metadata={"help": "Optimizer steps between greedy evaluations on test problems."}
    )
    validation_source: Literal["held_out", "train"] = field(
        default="held_out",
        metadata={
            "help": "Where an alpha_controller that validates takes its questions: the last of the train split, which "
            "are not trained on; or fresh training questions at each step, not trained on in that pass."
        },
    )
    num_completions_to_save: int = field(
        default=64, metadata={"help": "Of every generation, so many go to completions.jsonl with rewards; 0: none."}
    )


def main(argv: Sequence[str]) -> None:
    task_args, model_args, adapter_args, eval_args, args = parse(
        "logitmix train",
        "GRPO of the mixture of a policy (--model_name_or_path) and a frozen anchor (--anchor).",
        (TaskArguments, ModelArguments, AdapterArguments, EvaluationArguments, LogitMixGRPOConfig),
        argv,
    )
    if args.eval_strategy != "no":
        raise ValueError("eval_strategy evaluates by sampling, in TRL; for greedy evaluations use --eval_every STEPS")
    peft_config = adapter_args.peft_config
    arguments = {"command": "train"} | vars(task_args) | vars(model_args) | vars(adapter_args) | vars(eval_args)
    arguments |= args.to_dict()
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
    say_what_is_shared(trainer.model)
    data = {"train": problems, "validation": validation_problems}
    callbacks: list[TrainerCallback] = [CompletionsFile(trainer, eval_args.num_completions_to_save)]
    if eval_args.eval_every:
        data["test"] = task.problems("test", task_args.eval_limit)
        evaluate = evaluation(trainer, task, data["test"], Path(args.output_dir))
        callbacks.append(EverySteps(eval_args.eval_every, evaluate))
    run_training(trainer, argv, f"train on {task.name}", arguments, checkpoint, callbacks, data)
    console.print(f"The {'mixture' if 'mixture' in members_of(trainer.model) else 'model'} is in {args.output_dir}.")


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
        require_chat_template(tokenizer)
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
    """A function of the step that evaluates policy, anchor and mixture and appends their rates to the run's file.

    Processes share the problems. The anchor is frozen, so it is decoded once.
    """
    accelerator = trainer.accelerator
    mine = problems[accelerator.process_index :: accelerator.num_processes]
    anchor: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        names = {name: alpha for name, alpha in members_of(trainer.model).items() if name != "anchor" or not anchor}
        with trainer.generation_model() as model:
            responses = greedy_responses(
                model, trainer.processing_class, task, mine, names, trainer.max_completion_length
            )
        rows = gather_object([asdict(response) for response in responses])
        anchor.extend(row for row in rows if row["name"] == "anchor")
        rates = rates_by([row for row in rows if row["name"] != "anchor"] + anchor, "name")
        if trainer.is_world_process_zero():
            lines = [{"step": step, "name": name} | asdict(r) for name, r in rates.items()]
            append_jsonl(folder / EVALUATIONS_FILE, lines)

    return evaluate
