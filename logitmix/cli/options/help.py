"""`--help` of a command, from the dataclasses of its options.

The configurations of TRL have more than a hundred fields. Those that most runs set are shown; `--help all` shows all.
"""

import inspect
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from logitmix.cli.options.described import Described

# Settings of TRL and transformers that most runs set
COMMON = {
    "output_dir": "Folder of the run: checkpoints, metrics, and the model.",
    "max_steps": "Number of updates; overrides --num_train_epochs.",
    "num_train_epochs": "Number of passes over the training data.",
    "per_device_train_batch_size": "Sequences in a forward and backward pass, on each device.",
    "gradient_accumulation_steps": "Forward and backward passes in an update.",
    "steps_per_generation": "Passes that use the rollouts of an outer step; default: --gradient_accumulation_steps.",
    "num_generations": "Rollouts of each question.",
    "max_completion_length": "Longest rollout, in tokens.",
    "max_length": "Longest example, in tokens; longer ones are left out.",
    "temperature": "Sampling temperature of rollouts.",
    "learning_rate": "Initial learning rate of AdamW.",
    "lr_scheduler_type": "Schedule of the learning rate: constant, linear, cosine, ...",
    "beta": "Coefficient of the KL penalty; with an anchor it needs --kl_to anchor.",
    "epsilon": "Clipping range of the ratio.",
    "bf16": "Compute in bfloat16; default: true, unless --fp16.",
    "use_cpu": "Train on the CPU, even if there is a GPU.",
    "gradient_checkpointing": "Recompute activations in the backward pass, to save memory.",
    "use_vllm": "Sample rollouts with vLLM.",
    "seed": "Seed of initial weights, data order and rollouts.",
    "save_steps": "Updates between checkpoints.",
    "save_total_limit": "Number of checkpoints to keep; default: all.",
    "resume_from_checkpoint": "true: continue from the run's last complete checkpoint; or the folder of one.",
    "logging_steps": "Updates between lines of metrics.jsonl.",
    "report_to": "Trackers to log to: wandb, tensorboard, trackio, ...; none: metrics.jsonl only.",
}
FIRST = ("task", "model_name_or_path", "anchor")  # within their groups
REFERENCE = {
    "GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig",
    "DistillationConfig": "https://huggingface.co/docs/trl/distillation_trainer#trl.DistillationConfig",
    "SFTConfig": "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
}
COLUMN = 34  # where descriptions begin
TYPE_NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT"}


def asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(
    verb: str,
    description: str,
    groups: Sequence[type],
    positional: tuple[str, str] | None = None,
    everything: bool = False,
    footer: str = "Flags may also come from a YAML file, with --config FILE; flags on the command line override it.",
) -> None:
    """Print usage, description, the flags of each group, and where TRL's other flags are documented."""
    first, shown = positional or ("", "")
    required = [
        f"--{field.name} {_type_name(field.type)}"
        for group in groups
        for field in _fields(group)
        if field.default is MISSING and field.default_factory is MISSING and field.name != first
    ]
    words = ["usage: logitmix", verb, shown, *required, "[flags]"]
    print(" ".join(filter(None, words)))
    _print_wrapped(f"\n{description}")
    library = None
    for group in groups:
        own, inherited = _split_fields(group)
        if own:
            _print_group(_heading(group), own, positional)
        if inherited:
            assert issubclass(group, Described)
            library = group.library
            if everything:
                _print_group(f"All other fields of TRL's {library}", inherited)
            else:
                by_name = {field.name: field for field in inherited}
                common = {name: text for name, text in COMMON.items() if name in by_name}
                _print_group(f"Common settings of TRL's {library}", [by_name[name] for name in common], texts=common)
    if library is not None and not everything:
        _print_wrapped(
            f"\nEvery other field of TRL's {library} is a flag as well: `logitmix {verb} --help all` lists "
            f"them, and {REFERENCE[library]} documents them."
        )
    _print_wrapped(f"\n{footer}")


def _heading(group: type) -> str:
    if issubclass(group, Described):
        return "Mixture and training"
    return (inspect.getdoc(group) or group.__name__).splitlines()[0].rstrip(".")


def _fields(group: type) -> list[Field]:
    by_name = {field.name: field for field in fields(group) if field.init}
    for name, hint in get_type_hints(group).items():
        if name in by_name:
            by_name[name].type = hint
    return list(by_name.values())


def _split_fields(group: type) -> tuple[list[Field], list[Field]]:
    """Fields that logitmix defines or redefines, in its order, and the others, of TRL and transformers."""
    by_name = {field.name: field for field in _fields(group)}
    names = group.own if issubclass(group, Described) else list(by_name)
    own = sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return [by_name[name] for name in own], [field for name, field in by_name.items() if name not in own]


def _print_group(
    heading: str,
    group: Collection[Field],
    positional: tuple[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    print(f"\n{heading}:")
    for field in group:
        flag = f"  --{field.name} {_type_name(field.type)}"
        if positional is not None and field.name == positional[0]:
            flag = f"  {positional[1]}"
        text = (texts or {}).get(field.name) or str(field.metadata.get("help", "")).replace("%%", "%")
        lines = textwrap.wrap(" ".join(text.split()) + _default(field, text), _width() - COLUMN)
        if len(flag) >= COLUMN - 1:
            print(flag)
        else:
            print(f"{flag:<{COLUMN}}{lines.pop(0) if lines else ''}".rstrip())
        for line in lines:
            print(" " * COLUMN + line)


def _print_wrapped(text: str) -> None:
    break_before = "\n" if text.startswith("\n") else ""
    print(break_before + textwrap.fill(text.strip(), _width(), break_long_words=False, break_on_hyphens=False))


def _width() -> int:
    return max(COLUMN + 30, min(shutil.get_terminal_size().columns, 110))


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _type_name(next(argument for argument in arguments if argument is not NoneType))
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if hint is bool:
        return "[BOOL]"  # the flag alone means true
    if origin is list or hint is list:
        return f"{_type_name(arguments[0]) if arguments else 'TEXT'} ..."
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "NAME"
    if origin is dict or hint is dict:
        return "JSON"
    return TYPE_NAMES.get(hint, "TEXT")


def _default(field: Field, text: str) -> str:
    """` (default: 0.5)`, or nothing if the default is None or empty, or the description gives it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    value = value.value if isinstance(value, Enum) else value
    if value is MISSING or value is None or value == "" or "default" in text:
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, list) else value})"
