"""`--dry_run`: the settings of a run with their sources, its token budget, and the memory it needs on each device."""

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig
from trl import SFTConfig

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.evaluation import EvaluationArguments
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.memory_plan import anchor_sizes, device_sizes, print_disk, print_memory, vllm_sizes
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.loading import is_same_source
from logitmix.paper.recipes import load_recipe
from logitmix.training.alpha.controllers import validate_alpha
from logitmix.training.budget import Batches, Setup
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.config_checks import validate_options
from logitmix.training.model_shape import adapter_size, model_shape

# The models that answer each validation question, by controller: policy, mixture, and the anchor
VALIDATED_MODELS = {"adaptive": 2, "validation_weighted": 3}


def dry_run_train(
    recipe_args: RecipeArguments,
    task_args: TaskArguments,
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    eval_args: EvaluationArguments,
    args: LogitMixGRPOConfig,
) -> None:
    """Print the plan of a GRPO run. Raises `ValueError` for wrong options, and if it does not fit the device."""
    validate_alpha(args.alpha)
    validate_options(args)
    policy = model_args.model_name_or_path
    configs = model_configs(policy, recipe_args.recipe)
    if args.anchor is not None:
        configs += model_configs(args.anchor, recipe_args.recipe)
    members = tuple(map(model_shape, configs))
    own_adapter = adapter_at(policy)
    adapter = adapter_args.peft_config or own_adapter
    batches = Batches(
        rows=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        num_generations=args.num_generations,
        processes=recipe_args.processes,
    )
    updates = args.max_steps
    if updates <= 0:
        updates = int(batches.updates_in(train_size(task_args)) * args.num_train_epochs)
    outer_steps = math.ceil(updates / batches.updates_per_outer_step)
    rollouts = outer_steps * batches.rollouts_per_outer_step
    decodes = evaluated_responses(task_args.eval_limit, eval_args.eval_every, updates, len(members))
    validated = outer_steps * args.validation_size * VALIDATED_MODELS.get(args.alpha_controller, 0)
    print_settings(recipe_args, (task_args, model_args, adapter_args, eval_args, args))
    print_budget(
        {
            "updates": f"{updates:,}, of {batches.rollouts_per_update:,} rollouts each",
            "outer steps": f"{outer_steps:,}, of {batches.rollouts_per_outer_step:,} rollouts each",
            "questions": f"{rollouts // args.num_generations:,}, of {args.num_generations} rollouts each",
            "greedy responses": f"{decodes:,} to evaluate, {validated:,} to set alpha",
            "reference of the KL": _reference(args, len(members), own_adapter is not None, adapter is not None),
            "tokens sampled": f"at most {(rollouts + decodes + validated) * args.max_completion_length:,}",
        }
    )
    setup = Setup(
        members=members,
        reference=members[0] if args.beta != 0 and len(members) == 1 and adapter is None else None,
        reference_adapter=args.beta != 0 and len(members) == 1 and own_adapter is not None,
        rows=batches.rows,
        sampled=0 if args.use_vllm else args.rollout_batch_size or batches.rows * batches.steps_per_generation,
        prompt=recipe_args.prompt_length,
        completion=args.max_completion_length,
        adapter=0 if adapter is None else adapter_size(configs[0], adapter),
        one_base=adapter is not None and args.anchor is not None and _share_base(args.anchor, policy),
        **anchor_sizes(args, model_args.dtype, configs, is_adapter=adapter_at(args.anchor) is not None),
        **vllm_sizes(args, recipe_args),
        **device_sizes(recipe_args, model_args, args),
    )
    print_memory(recipe_args, setup)
    print_disk(args, setup, updates)


def evaluated_responses(eval_limit: int, eval_every: int | None, updates: int, num_members: int) -> int:
    """The greedy responses of a run's evaluations: of policy and mixture each time, of the anchor once."""
    if eval_every is None:
        return 0
    times = 1 + math.ceil(updates / eval_every)
    return eval_limit * (2 * times + 1 if num_members > 1 else times)


def dry_run_sft(
    recipe_args: RecipeArguments,
    task_args: TaskArguments,
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    args: SFTConfig,
) -> None:
    """Print the plan of an SFT run. Raises `ValueError` if it does not fit the memory of the device."""
    (config,) = model_configs(model_args.model_name_or_path, recipe_args.recipe)
    adapter = adapter_args.peft_config
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * recipe_args.processes
    updates = args.max_steps
    if updates <= 0:
        updates = math.ceil(math.ceil(train_size(task_args) / batch) * args.num_train_epochs)
    longest = args.max_length or recipe_args.prompt_length
    print_settings(recipe_args, (task_args, model_args, adapter_args, args))
    print_budget(
        {
            "updates": f"{updates:,}, of {batch:,} examples each",
            "tokens read": f"at most {updates * batch * longest:,}",
        }
    )
    setup = Setup(
        members=(model_shape(config),),
        reference=None,
        adapter=0 if adapter is None else adapter_size(config, adapter),
        rows=args.per_device_train_batch_size,
        sampled=0,
        prompt=0,
        completion=longest,
        **device_sizes(recipe_args, model_args, args),
    )
    print_memory(recipe_args, setup)
    print_disk(args, setup, updates)


def model_configs(source: str, recipe: str | None) -> list[PreTrainedConfig]:
    """The configuration of the model at a folder or hub id, or of each member of a mixture.

    A recipe holds the configuration of its own models: its dry run needs no hub, and no anchor that exists already.
    Raises `ValueError` if the size of the model cannot be found.
    """
    source = _base_of(source)
    config = _recipe_config(source, recipe) if recipe and not Path(source, "config.json").exists() else None
    if config is None:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"there is no config.json at {source!r}, which gives the size of the model; check the name"
            ) from error
    return config.member_configs if isinstance(config, LogitMixConfig) else [config]


def _reference(args: LogitMixGRPOConfig, num_members: int, continues: bool, has_adapter: bool) -> str:
    """What the KL of `--beta` is to, and the memory it takes beside the policy."""
    if args.beta == 0:
        return "none, as beta is 0"
    if num_members > 1:
        return "the anchor, which is held already"
    if continues:
        return "a frozen copy of the adapter as it is now"
    return "the model without its adapter, which is held already" if has_adapter else "a frozen copy of the model"


def adapter_at(source: str | None) -> PeftConfig | None:
    """The configuration of the adapter in a folder; None for a hub id, as a dry run uses no network."""
    return read_adapter_config(source) if source is not None and Path(source).is_dir() else None


def _base_of(source: str) -> str:
    """The base model of an adapter's folder, or the model itself."""
    adapter = adapter_at(source)
    return source if adapter is None else str(adapter.base_model_name_or_path)


def _share_base(anchor: str, policy: str) -> bool:
    """Whether the anchor is an adapter on the policy's base, or that base."""
    return is_same_source(_base_of(anchor), _base_of(policy))


def _recipe_config(source: str, recipe: str) -> PreTrainedConfig | None:
    """The configuration in a recipe for its own base and SFT model; None for other models."""
    stage = load_recipe(f"{recipe.rpartition('/')[0]}/sft")
    if source not in (stage.values["model_name_or_path"].value, stage.values["output_dir"].value):
        return None
    return AutoConfig.for_model(**stage.model_config)


def train_size(task_args: TaskArguments) -> int:
    """The number of problems in an epoch."""
    return task_args.train_limit or len(task_args.load().problems("train"))


def print_settings(recipe_args: RecipeArguments, parsed: Sequence[Any]) -> None:
    """Print each value that is not a default, with its source, except the settings of the dry run itself."""
    table = Table("setting", "value", "from", title=recipe_args.recipe or "settings", title_justify="left")
    for key, source in recipe_args.sources.items():
        owner = next((instance for instance in parsed if hasattr(instance, key)), None)
        if owner is not None:
            value = getattr(owner, key)
            table.add_row(key, str(value.value if isinstance(value, Enum) else value), source)
    Console().print(table)


def print_budget(budget: Mapping[str, str]) -> None:
    """Print how many updates, rollouts and tokens the run has."""
    table = Table(title="token budget", title_justify="left", show_header=False)
    for row in budget.items():
        table.add_row(*row)
    Console().print(table)
