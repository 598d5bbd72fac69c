"""What a dry run says of the memory on each device, and of the disk."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.recipe import RecipeArguments
from logitmix.mixture.dtypes import as_dtype
from logitmix.training.budget import Part, Setup, disk_bytes, memory, peak, phase_bytes
from logitmix.training.config import LogitMixGRPOConfig

GIB = 2**30
_TITLES = {
    "sampling": "sampling",
    "scoring": "scoring",
    "forward": "update, forward pass",
    "update": "update, gradients",
    "saving": "saving",
}


def device_sizes(recipe_args: RecipeArguments, model_args: ModelArguments, args: TrainingArguments) -> dict[str, Any]:
    """The arguments of `Setup` that GRPO and SFT share."""
    given = (getattr(args, "model_init_kwargs", None) or {}).get("quantization_config")
    weight = 4 if model_args.dtype == "float32" else 2
    return {
        "weight": weight,
        "compute": 2 if args.bf16 or args.fp16 else weight,
        "checkpointing": args.gradient_checkpointing,
        "accumulates": args.gradient_accumulation_steps > 1,
        "moments": moment_bytes(args.optim),
        "base_bits": 0 if given is None else quantization_bits(given),
        "device": "cpu" if args.use_cpu else "cuda",
        "processes": recipe_args.processes,
        "sharded": recipe_args.sharded or launched_sharded(),
    }


def moment_bytes(optimizer: Any) -> float | None:
    """Bytes per number that an optimizer of transformers holds; None for two moments in the weights' dtype."""
    name = str(getattr(optimizer, "value", optimizer))
    if "8bit" in name:
        return 2.03  # with the scales of blocks of 256
    if "4bit" in name:
        return 1.06
    if name in ("sgd", "adafactor"):
        return 0.01
    return None


def quantization_bits(given: Any) -> float:
    """Bits per number of quantised layers, with their scales; of an unknown kind 8."""
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        is_4bit, packs = "4" in given, given != "int4" or torch.cuda.is_available()
        return 4.5 if is_4bit and packs else 8.5 if is_4bit else 8.1
    values = json.loads(given) if isinstance(given, str) else given
    values = values if isinstance(values, Mapping) else values.to_dict()
    if values.get("load_in_4bit") or values.get("bits") == 4 or "nt4" in str(values.get("quant_type", "")):
        return 4.5
    return 8.1


def anchor_sizes(
    args: LogitMixGRPOConfig, policy: str, configs: Sequence[PreTrainedConfig], is_adapter: bool
) -> dict[str, Any]:
    """The arguments of `Setup` for the anchor."""
    saved = getattr(configs[-1], "quantization_config", None) if len(configs) > 1 else None
    quantization = args.anchor_quantization or saved
    generate_every = args.steps_per_generation * args.num_iterations
    return {
        "anchor_weight": _anchor_weight(args, policy, configs, is_adapter),
        "anchor_bits": 0 if quantization is None else quantization_bits(quantization),
        "offload": args.offload_anchor,
        "scores": args.gradient_accumulation_steps % generate_every != 0 or args.beta != 0 or args.use_vllm,
    }


def _anchor_weight(
    args: LogitMixGRPOConfig, policy: str, configs: Sequence[PreTrainedConfig], is_adapter: bool
) -> int:
    """Bytes per number of the anchor's weights; 0 for the policy's.

    A configuration that names no dtype, as a recipe's, counts as float32.
    """
    if len(configs) < 2:
        return 0
    anchor = configs[1].dtype if args.anchor is None else None
    if anchor is None:
        chosen = args.anchor_dtype or ("auto" if policy in ("float32", "auto") else policy)
        if args.anchor_dtype is None and is_adapter:
            return 0
        anchor = configs[1].dtype if chosen == "auto" else as_dtype(chosen)
    return 4 if anchor is None else as_dtype(anchor).itemsize


def launched_sharded() -> bool:
    """Whether `accelerate launch` set the environment variables of FSDP or ZeRO-3."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def vllm_sizes(args: LogitMixGRPOConfig, recipe_args: RecipeArguments) -> dict[str, Any]:
    """The arguments of `Setup` for an engine of vLLM on the same device."""
    available = device_bytes(recipe_args.device_memory)
    if not args.use_vllm or args.vllm_mode != "colocate" or available is None:
        return {}
    return {
        "engine": args.vllm_gpu_memory_utilization * available,
        "engine_sleeps": args.vllm_enable_sleep_mode,
    }


def print_memory(recipe_args: RecipeArguments, setup: Setup) -> None:
    """Print the parts of the memory needed on a device. Raises `ValueError` if it has less."""
    devices = f"each of {setup.processes} devices" if setup.processes > 1 else "one device"
    parts = memory(setup)
    table = Table("", "GiB", "when", title=f"memory of {devices}, estimated", title_justify="left")
    for part in parts:
        table.add_row(part.name, f"{part.size / GIB:.2f}", part.phase)
    table.add_section()
    phases = {phase: size for phase, size in phase_bytes(parts).items() if any(p.phase == phase for p in parts)}
    for phase, size in phases.items():
        table.add_row(f"in all, {_TITLES[phase]}", f"{size / GIB:.2f}", "")
    needed = peak(parts)
    table.add_row("at most at a time", f"{needed / GIB:.2f}", "", style="bold")
    console = Console()
    console.print(table)
    prompts = f"Prompts are assumed to have {setup.prompt} tokens. " if setup.sampled else ""
    console.print(f"{prompts}Not counted: a GPU's context, and fragmentation.", soft_wrap=True)
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
        part.size
        for part in parts
        if part.name.startswith(("gradients", "weights")) and part.phase in ("update", "forward")
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


def device_bytes(size: str | None, flag: str = "--device_memory") -> int | None:
    """The memory of a device in bytes: as given (`80GiB`), or else the GPU's; None without a GPU."""
    if size is not None:
        try:
            return int(convert_file_size_to_int(size))
        except ValueError as error:
            raise ValueError(f"{flag} is {size!r}; write it as 80GiB or 80GB") from error
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def print_disk(args: TrainingArguments, setup: Setup, updates: int) -> None:
    """Print the disk that the checkpoints and the model of a run take."""
    if args.save_strategy == SaveStrategy.STEPS:
        every = max(1, args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * updates))
        saved = math.ceil(updates / every)  # also at the end
    else:
        saved = {SaveStrategy.NO: 0, SaveStrategy.EPOCH: math.ceil(args.num_train_epochs)}.get(args.save_strategy, 1)
    kept = min(saved, args.save_total_limit or saved)
    mode = getattr(args, "save_frozen", "always") if len(setup.members) > 1 else "always"
    if getattr(args, "reanchor_steps", None) is not None and not setup.one_base:
        mode = "always"  # checkpoints hold the anchor, which changes; of one base only its adapter, which is small
    sizes = disk_bytes(setup, kept, mode, not args.save_only_model)
    total = sum(sizes.values())
    Console().print(
        f"Disk at the end of the run: {total / GIB:.2f} GiB, {kept} checkpoints in "
        f"{sizes['checkpoints'] / GIB:.2f} GiB and the model in {sizes['model'] / GIB:.2f} GiB."
    )
