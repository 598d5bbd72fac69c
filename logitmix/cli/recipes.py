"""`logitmix recipes`: the names that `--recipe` accepts, and which of them fit a device."""

from collections.abc import Sequence

from rich.console import Console

from logitmix.cli.options.help import asks_for_help
from logitmix.paper.recipes import ARMS, CELLS, EXTRA_ARMS, SFT


def main(argv: Sequence[str]) -> None:
    argv = [part for flag in argv for part in flag.split("=", 1)]
    if argv and argv[0] == "--fits" and not asks_for_help(argv):
        if len(argv) != 2:
            raise ValueError("--fits takes the memory of one device, as in `logitmix recipes --fits 80GiB`")
        print_fits(argv[1])
        return
    if argv and not asks_for_help(argv):
        raise ValueError(
            f"`logitmix recipes` takes no arguments but --fits SIZE, got {argv[0]!r}; to see a recipe, run logitmix "
            "train --recipe NAME --dry_run"
        )
    console = Console()
    console.print("A recipe is CELL/ARM, for `logitmix train --recipe`, or CELL/sft, for `logitmix sft --recipe`.\n")
    console.print("cells  " + "\n       ".join(CELLS) + "\n", highlight=False)
    console.print("arms   " + "\n       ".join(ARMS) + f"\n       {SFT}: the anchor, which most arms need first")
    console.print("       beyond the paper: " + ", ".join(EXTRA_ARMS) + "\n")
    console.print("With --dry_run, both commands print a recipe's settings with their sources, and the memory needed.")
    console.print("`logitmix recipes --fits 80GiB` prints what fits one device of that size, and the commands.")


def print_fits(size: str) -> None:
    """Print what fits a device of this size, such as 24GiB, and the command for each cell."""
    from rich.table import Table

    from logitmix.cli.options.memory_plan import GIB, device_bytes
    from logitmix.paper.fits import SETTINGS, table

    available = device_bytes(size, "--fits")
    assert available is not None
    grid = Table("cell", *SETTINGS, title=f"rows / rollouts at a time on one device of {size}", title_justify="left")
    commands = []
    for cell, fits, command in table(available):
        cells = [f"{f.rows} / {f.sampled}" if f.rows else f"needs {f.needed / GIB:,.0f} GiB" for f in fits.values()]
        grid.add_row(cell, *cells)
        commands.append((cell, command))
    console = Console()
    console.print(grid)
    console.print(
        "Estimated as by --dry_run, with fixed mixing and gradient checkpointing. LoRA is of rank 16 on all linear "
        "layers of a bfloat16 base, beside an SFT adapter (`logitmix sft --recipe CELL/sft --use_peft true`) on it.\n",
        soft_wrap=True,
    )
    for cell, command in commands:
        console.print(f"{cell:<12}{command}", soft_wrap=True, highlight=False, markup=False)
