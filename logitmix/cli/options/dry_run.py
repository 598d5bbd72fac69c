"""`--dry_run`: the settings of a run with their sources, its token budget, and the memory it needs on each device."""

import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments
from trl import SFTConfig

from logitmix.cli.options.data import TaskArguments
from logitmix.cli.options.evaluation import EvaluationArguments
from logitmix.cli.options.lora import AdapterArguments
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.dtypes import as_dtype
from logitmix.paper.recipes import load_recipe
from logitmix.training.alpha.controllers import VALIDATING, validate_alpha
from logitmix.training.budget import Batches, Part, Setup, adapter_size, memory, model_shape, peak
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.config_checks import validate_options

GIB = 2**30


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
    own_adapter = _adapter_at(policy)
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
    decodes = 0
    if eval_args.eval_every:
        times = 1 + math.ceil(updates / eval_args.eval_every)
        decodes = task_args.eval_limit * (2 * times + 1 if len(members) > 1 else times)
    validated = 0  # greedy responses
    if args.alpha_controller in VALIDATING:  # of policy and mixture; validation_weighted also of the anchor
        validated = outer_steps * args.validation_size * (2 if args.alpha_controller == "adaptive" else 3)
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
        sampled=args.rollout_batch_size or batches.rows * batches.steps_per_generation,
        prompt=recipe_args.prompt_length,
        completion=args.max_completion_length,
        adapter=0 if adapter is None else adapter_size(configs[0], adapter),
        anchor_weight=_anchor_weight(args, model_args.dtype, configs),
        one_base=adapter is not None and args.anchor is not None and _base_of(args.anchor) == _base_of(policy),
        **_device(recipe_args, model_args, args),
    )
    print_memory(recipe_args, setup)


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
        **_device(recipe_args, model_args, args),
    )
    print_memory(recipe_args, setup)


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


def _adapter_at(source: str) -> PeftConfig | None:
    """The configuration of the adapter in a folder; None for a hub id, as a dry run uses no network."""
    return read_adapter_config(source) if Path(source).is_dir() else None


def _base_of(source: str) -> str:
    """The base model of an adapter's folder, or the model itself."""
    adapter = _adapter_at(source)
    return source if adapter is None else str(adapter.base_model_name_or_path)


def _recipe_config(source: str, recipe: str) -> PreTrainedConfig | None:
    """The configuration in a recipe for its own base and SFT model; None for other models."""
    stage = load_recipe(f"{recipe.rpartition('/')[0]}/sft")
    if source not in (stage.values["model_name_or_path"].value, stage.values["output_dir"].value):
        return None
    return AutoConfig.for_model(**stage.model_config)


def train_size(task_args: TaskArguments) -> int:
    """The number of problems in an epoch."""
    return task_args.train_limit or len(task_args.load().problems("train"))


def _device(recipe_args: RecipeArguments, model_args: ModelArguments, args: TrainingArguments) -> dict[str, Any]:
    """The arguments of `Setup` that GRPO and SFT share."""
    weight = 4 if model_args.dtype == "float32" else 2
    return {
        "weight": weight,
        "compute": 2 if args.bf16 or args.fp16 else weight,
        "checkpointing": args.gradient_checkpointing,
        "processes": recipe_args.processes,
        "sharded": recipe_args.sharded or _launched_sharded(),
    }


def _anchor_weight(args: LogitMixGRPOConfig, policy: str, configs: Sequence[PreTrainedConfig]) -> int:
    """Bytes per number of the anchor's weights; 0 for the policy's.

    A configuration that names no dtype, as a recipe's, counts as float32.
    """
    if len(configs) < 2:
        return 0
    anchor = configs[1].dtype if args.anchor is None else None
    if anchor is None:
        chosen = args.anchor_dtype or ("auto" if policy in ("float32", "auto") else policy)
        is_adapter = args.anchor is not None and _adapter_at(args.anchor) is not None
        if args.anchor_dtype is None and is_adapter:
            return 0
        anchor = configs[1].dtype if chosen == "auto" else as_dtype(chosen)
    return 4 if anchor is None else as_dtype(anchor).itemsize


def _launched_sharded() -> bool:
    """Whether `accelerate launch` set the environment variables of FSDP or ZeRO-3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


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


def print_memory(recipe_args: RecipeArguments, setup: Setup) -> None:
    """Print the parts of the memory needed on a device. Raises `ValueError` if it has less."""
    devices = f"each of {setup.processes} devices" if setup.processes > 1 else "one device"
    parts = memory(setup)
    table = Table("", "GiB", "when", title=f"memory of {devices}, estimated", title_justify="left")
    for part in parts:
        table.add_row(part.name, f"{part.size / GIB:.2f}", part.phase)
    needed = peak(parts)
    table.add_row("at most at a time", f"{needed / GIB:.2f}", "", style="bold")
    console = Console()
    console.print(table)
    prompts = f"Prompts are assumed to have {setup.prompt} tokens. " if setup.sampled else ""
    console.print(f"{prompts}Not counted: the CUDA context and fragmentation.", soft_wrap=True)
    available = device_bytes(recipe_args.device_memory)
    if available is not None and needed > available:
        raise ValueError(
            f"{recipe_args.recipe or 'the run'} needs about {needed / GIB:.1f} GiB on {devices}, which has "
            f"{available / GIB:.1f} GiB; {suggest_change(parts, setup, available)}"
        )


def suggest_change(parts: list[Part], setup: Setup, available: float) -> str:
    """The least costly change with which the run may fit."""
    state = sum(part.size for part in parts if part.phase == "always")
    gradients = sum(
        part.size for part in parts if part.name.startswith(("gradients", "weights")) and part.phase == "update"
    )
    if state + gradients >= available:
        return (
            "spread its weights over more devices with FSDP (configs/accelerate/fsdp2.yaml; in a dry run "
            "--sharded --num_processes N)"
        )
    sampling = sum(part.size for part in parts if part.phase == "sampling")
    if state + sampling > available:
        return f"lower --rollout_batch_size, which is {setup.sampled}"
    if not setup.checkpointing:
        return "set --gradient_checkpointing true"
    return (
        f"lower --per_device_train_batch_size, which is {setup.rows}, and raise --gradient_accumulation_steps and "
        "--steps_per_generation by as much"
    )


def device_bytes(size: str | None) -> int | None:
    """The memory of a device in bytes: as given (`80GiB`), or else the GPU's; None without a GPU."""
    if size is not None:
        try:
            return int(convert_file_size_to_int(size))
        except ValueError as error:
            raise ValueError(f"--device_memory is {size!r}; write it as 80GiB or 80GB") from error
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
