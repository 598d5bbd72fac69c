"""`logitmix recipes`: the names that `--recipe` takes."""

from collections.abc import Sequence

from rich.console import Console

from logitmix.paper.recipes import ARMS, CELLS, SFT


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(
            f"`logitmix recipes` takes no arguments, got {argv[0]!r}; `train --recipe NAME --dry_run` shows a recipe"
        )
    console = Console()
    console.print("A recipe is CELL/ARM, for `logitmix train --recipe`, or CELL/sft, for `logitmix sft --recipe`.\n")
    console.print("cells  " + "\n       ".join(CELLS) + "\n", highlight=False)
    console.print("arms   " + "\n       ".join(ARMS) + f"\n       {SFT}: the anchor, which most arms need first\n")
    console.print("With --dry_run the commands print a recipe's settings, each with its source, and what it needs.")
