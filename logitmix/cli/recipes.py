"""`logitmix recipes`: the names that `--recipe` accepts."""

from collections.abc import Sequence

from rich.console import Console

from logitmix.cli.options.help import asks_for_help
from logitmix.paper.recipes import ARMS, CELLS, SFT


def main(argv: Sequence[str]) -> None:
    if argv and not asks_for_help(argv):
        raise ValueError(
            f"`logitmix recipes` takes no arguments, got {argv[0]!r}; to see a recipe, run logitmix train --recipe "
            "NAME --dry_run"
        )
    console = Console()
    console.print("A recipe is CELL/ARM, for `logitmix train --recipe`, or CELL/sft, for `logitmix sft --recipe`.\n")
    console.print("cells  " + "\n       ".join(CELLS) + "\n", highlight=False)
    console.print("arms   " + "\n       ".join(ARMS) + f"\n       {SFT}: the anchor, which most arms need first\n")
    console.print("With --dry_run, both commands print a recipe's settings with their sources, and the memory needed.")
