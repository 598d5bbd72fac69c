"""Flags for recipes and dry runs."""

import os
from dataclasses import dataclass, field

from logitmix.cli.options.validation import validate_at_least


@dataclass
class RecipeArguments:
    """Recipe and dry run"""

    recipe: str | None = field(
        default=None,
        metadata={"help": "Settings by name, such as math/3b/fixed_mixing; `logitmix recipes` lists the names."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print settings, token budget and memory needed, and train nothing."}
    )
    device_memory: str | None = field(
        default=None,
        metadata={"help": "With --dry_run: memory of a device, such as 80GiB; default: that of the GPU found."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "With --dry_run: number of processes, one for each device; default: as many as launched."},
    )
    sharded: bool = field(
        default=False,
        metadata={"help": "With --dry_run: shard weights with FSDP or ZeRO-3; default: as launched."},
    )
    prompt_length: int = field(
        default=1024, metadata={"help": "With --dry_run: length of the longest prompt, in tokens."}
    )
    # of each value that is not a default, by key: "flag", "config file", or the recipe's layer, source and reason
    sources: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("device_memory", "num_processes", "sharded"):
            if getattr(self, key) and not self.dry_run:
                raise ValueError(f"--{key} is for --dry_run alone; add --dry_run, or leave it out")
        validate_at_least(self, num_processes=1, prompt_length=1)

    @property
    def processes(self) -> int:
        return self.num_processes or launched_processes()


def launched_processes() -> int:
    """The number of processes that `torchrun` or `accelerate launch` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1))
