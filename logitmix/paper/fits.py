"""What fits one device: each cell of the paper, and a 72B model, trained in full or as adapters."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from peft import LoraConfig
from transformers import AutoConfig

from logitmix.paper.recipes import PAPER_CELLS, load_recipe
from logitmix.training.budget import Setup, memory, peak
from logitmix.training.model_shape import adapter_size, model_shape

# https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/config.json
LARGE = "math/72b"
_LARGE_CONFIG = {
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
CELLS = (*PAPER_CELLS, LARGE)
_ADAPTER = "--use_peft true --lora_target_modules all-linear --dtype bfloat16"
_NF4 = """--model_init_kwargs '{"quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}'"""
# by name: whether an adapter trains, the arguments of `Setup`, and the flags
SETTINGS: dict[str, tuple[bool, dict[str, Any], str]] = {
    "full": (False, {}, "--offload_anchor true"),
    "full, 8-bit optimizer": (False, {"moments": 2.03}, "--offload_anchor true --optim adamw_bnb_8bit"),
    "LoRA pair": (True, {}, _ADAPTER),
    "LoRA, quantised base": (True, {"base_bits": 4.5}, f"{_ADAPTER} {_NF4}"),
}
_MOST_ROWS, _MOST_DEVICES = 32, 128


@dataclass(frozen=True)
class Fit:
    """The largest batches with which a setting fits: rows of a forward pass, and rollouts sampled at a time.

    `needed` are the bytes of one row and one rollout; rows are 0 where these do not fit.
    """

    rows: int
    sampled: int
    needed: float


def setup_of(cell: str, name: str) -> Setup:
    """The cell's recipe with fixed mixing, in the setting of this name, with one row and one rollout at a time."""
    with_adapter, changes, _ = SETTINGS[name]
    recipe = load_recipe(f"{_recipe(cell)}/fixed_mixing")
    values, config = recipe.settings(), _config(cell)
    shape = model_shape(config)
    return Setup(
        members=(shape, shape), reference=None, weight=2 if with_adapter else 4, compute=2, rows=1, sampled=1,
        prompt=values["prompt_length"], completion=values["max_completion_length"], checkpointing=True, processes=1,
        sharded=False, adapter=_adapter(cell) if with_adapter else 0, one_base=with_adapter,
        offload=not with_adapter, **changes,
    )  # fmt: skip


def find_fit(setup: Setup, available: float) -> Fit:
    """The largest batches, in powers of two, of which no phase needs more than `available` bytes."""
    smallest = peak(memory(setup))
    if smallest > available:
        return Fit(0, 0, smallest)

    def largest(most: int, key: str) -> int:
        sizes = [2**i for i in range(most.bit_length())]
        return max(n for n in sizes if n == 1 or peak(memory(replace(setup, **{key: n}))) <= available)

    return Fit(largest(_MOST_ROWS, "rows"), largest(2048, "sampled"), smallest)


def find_devices(setup: Setup, available: float) -> int | None:
    """The number of devices among which FSDP spreads the weights so that the setting fits; None if it is too many."""
    number = 2
    while number <= _MOST_DEVICES:
        if peak(memory(replace(setup, processes=number, sharded=True))) <= available:
            return number
        number *= 2
    return None


def table(available: float) -> Iterator[tuple[str, dict[str, Fit], str]]:
    """For each cell what fits in each setting, and the command of the first that fits, or the way to make it fit."""
    for cell in CELLS:
        setups = {name: setup_of(cell, name) for name in SETTINGS}
        fits = {name: find_fit(setup, available) for name, setup in setups.items()}
        name = next((name for name, fit in fits.items() if fit.rows), None)
        if name is not None:
            yield cell, fits, command(cell, name, fits[name])
            continue
        devices = {name: find_devices(setups[name], available) for name in ("LoRA pair", "full")}
        found = {name: number for name, number in devices.items() if number is not None}
        name = min(found, key=lambda name: found[name]) if found else None
        yield cell, fits, "no setting fits" if name is None else f"{name}, sharded over {found[name]} devices"


def command(cell: str, name: str, fit: Fit) -> str:
    """The command that trains the cell in this setting, with as many rollouts in an update as the recipe."""
    recipe = load_recipe(f"{_recipe(cell)}/fixed_mixing")
    values = recipe.settings()
    rows = min(fit.rows, values["per_device_train_batch_size"] * 4)
    flags = [f"--recipe {recipe.name}", SETTINGS[name][2], f"--rollout_batch_size {fit.sampled}"]
    if cell == LARGE:
        flags.insert(1, "--model_name_or_path Qwen/Qwen2.5-72B-Instruct")
    if rows != values["per_device_train_batch_size"]:
        total = values["per_device_train_batch_size"]
        flags.append(f"--per_device_train_batch_size {rows}")
        for key in ("gradient_accumulation_steps", "steps_per_generation"):
            flags.append(f"--{key} {values[key] * total // rows}")
    return "logitmix train " + " ".join(flags)


def _recipe(cell: str) -> str:
    return "math/7b" if cell == LARGE else cell


def _config(cell: str) -> Any:
    values = _LARGE_CONFIG if cell == LARGE else load_recipe(f"{cell}/fixed_mixing").model_config
    return AutoConfig.for_model(**values)


def _adapter(cell: str) -> int:
    return _adapter_of_size(cell.rpartition("/")[2])


@cache
def _adapter_of_size(size: str) -> int:
    return adapter_size(_config(f"math/{size}"), LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
