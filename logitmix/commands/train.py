"""`logitmix train`: GRPO of the mixture of a policy and a frozen anchor (or of a model alone, without `--anchor`)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from logitmix.commands.arguments import ModelArguments, TaskArguments, parse
from logitmix.commands.callbacks import EverySteps, run_training
from logitmix.commands.runs import EVALUATIONS_FILE, append_jsonl, claim_folder, console
from logitmix.evaluation.decode import greedy_responses, members_of
from logitmix.evaluation.metrics import rates_by
from logitmix.generation import require_chat_template
from logitmix.tasks import Problem, Task
from logitmix.training.grpo import LogitMixGRPOConfig, LogitMixGRPOTrainer
from logitmix.training.rewards import TaskReward, grpo_dataset


@dataclass
class EvaluationArguments:
    """Greedy evaluation on test problems while training runs."""

    eval_every: int | None = field(
        default=None, metadata={"help": "Optimizer steps between greedy evaluations on test problems."}
    )


def main(argv: Sequence[str]) -> None:
    task_args, model_args, eval_args, args = parse(
        "logitmix train",
        "GRPO of the mixture of a policy (--model_name_or_path) and a frozen anchor (--anchor).",
        (TaskArguments, ModelArguments, EvaluationArguments, LogitMixGRPOConfig),
        argv,
    )
    task = task_args.load(args.seed)
    args.model_init_kwargs = model_args.init_kwargs | (args.model_init_kwargs or {})
    args.disable_tqdm = True
    if args.stop_strings is None and task.template.stop:
        args.stop_strings = list(task.template.stop)
    trainer = build_trainer(task, task.problems("train", task_args.train_limit), model_args.model_name_or_path, args)
    checkpoint = claim_folder(
        args.output_dir,
        {"command": "train"} | vars(task_args) | vars(model_args) | vars(eval_args) | args.to_dict(),
        args.resume_from_checkpoint,
    )
    if eval_args.eval_every:
        problems = task.problems("test", task_args.eval_limit)
        evaluate = evaluation(trainer, trainer.processing_class, task, problems, Path(args.output_dir))
        trainer.add_callback(EverySteps(eval_args.eval_every, evaluate))
    run_training(trainer, f"train on {task.name}", checkpoint, "train", argv)
    console.print(f"The mixture is in {args.output_dir}." if args.anchor else f"The model is in {args.output_dir}.")


def build_trainer(
    task: Task, problems: Sequence[Problem], model_name_or_path: str, args: LogitMixGRPOConfig
) -> LogitMixGRPOTrainer:
    """The trainer of one arm on a task's problems, rewarded as the paper does."""
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, padding_side="left", truncation_side="left")
    if task.template.chat:
        require_chat_template(tokenizer)
    return LogitMixGRPOTrainer(
        model_name_or_path,
        reward_funcs=TaskReward(task),
        args=args,
        train_dataset=grpo_dataset(task, problems),
        processing_class=tokenizer,
    )


def evaluation(
    trainer: LogitMixGRPOTrainer,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    folder: Path,
) -> Callable[[int], None]:
    """A function of the step that evaluates policy, anchor and mixture and appends their rates to the run's file."""

    def evaluate(step: int) -> None:
        responses = greedy_responses(
            trainer.model, tokenizer, task, problems, members_of(trainer.model), trainer.max_completion_length
        )
        rates = rates_by([response.as_dict() for response in responses], "name")
        append_jsonl(folder / EVALUATIONS_FILE, [{"step": step, "name": n} | asdict(r) for n, r in rates.items()])

    return evaluate
