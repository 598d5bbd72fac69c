"""What a command shows while it runs: log lines and progress bars, on standard error."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Standard output is for a command's result
console = Console(stderr=True)


def progress_bar() -> Progress:
    """A bar with title, steps done, time left, and a field `info` for the latest numbers."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers and datasets, which would interleave with `progress_bar`."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
