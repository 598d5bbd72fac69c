"""The trainer of a run on a task: its prompts, its reward, and which of its problems validate alpha."""

from collections.abc import Sequence

from peft import PeftConfig

from logitmix.mixture.loading import require_tokenizer
from logitmix.mixture.tokenizers import prepare_for_task, validate_chat_template
from logitmix.tasks import Problem, Task
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.rewards import TaskReward, grpo_dataset


def build_trainer(
    task: Task,
    problems: Sequence[Problem],
    model_name_or_path: str,
    args: LogitMixGRPOConfig,
    validation_problems: Sequence[Problem] = (),
    peft_config: PeftConfig | None = None,
) -> LogitMixGRPOTrainer:
    """The trainer of a policy on a task's problems, rewarded as in the paper."""
    tokenizer = require_tokenizer(
        model_name_or_path,
        padding_side="left",
        truncation_side="left",
        trust_remote_code=args.trust_remote_code,
    )
    if task.template.chat:
        validate_chat_template(tokenizer)
    prepare_for_task(tokenizer, task, problems)
    return LogitMixGRPOTrainer(
        model_name_or_path,
        reward_funcs=TaskReward(task),
        args=args,
        train_dataset=grpo_dataset(task, problems),
        validation_dataset=grpo_dataset(task, validation_problems) if validation_problems else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def split_validation(task: Task, limit: int | None, size: int) -> tuple[list[Problem], list[Problem]]:
    """The first `limit` training problems (None: all but the last `size`), and the `size` problems after them.

    Raises `ValueError` where the train split has no more than `size` problems.
    """
    problems = task.problems("train", None if limit is None else limit + size)
    if len(problems) <= size:
        raise ValueError(
            f"validation_size is {size}, but {task.name} has only {len(problems)} training problems, which would "
            "leave none to train on; lower validation_size"
        )
    return problems[: len(problems) - size], problems[len(problems) - size :]
