"""Flags that name a recipe, and those of the dry run."""

import os
from dataclasses import dataclass, field

from logitmix.cli.options.validation import validate_at_least


@dataclass
class RecipeArguments:
    """A recipe by name, and the dry run of whatever was asked for."""

    recipe: str | None = field(
        default=None,
        metadata={"help": "Settings by name, such as math/3b/fixed_mixing; `logitmix recipes` lists the names."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print settings, token budget and memory, and train nothing."}
    )
    device_memory: str | None = field(
        default=None, metadata={"help": "Dry run: memory of a device, such as 80GiB; default that of the GPU."}
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Dry run: number of processes, one a device; default as launched."}
    )
    sharded: bool = field(
        default=False, metadata={"help": "Dry run: weights sharded by FSDP or ZeRO-3; default as launched."}
    )
    prompt_length: int = field(default=1024, metadata={"help": "Dry run: tokens of the longest prompt."})
    # the source of each value that is not a default, by key
    sources: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("device_memory", "num_processes", "sharded"):
            if getattr(self, key) and not self.dry_run:
                raise ValueError(f"--{key} is read by --dry_run only; add --dry_run, or leave out --{key}")
        validate_at_least(self, num_processes=1, prompt_length=1)

    @property
    def processes(self) -> int:
        return self.num_processes or launched_processes()


def launched_processes() -> int:
    """The number of processes that `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", 1))
