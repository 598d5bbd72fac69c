"""What a command shows while it runs: log lines and progress, on standard error."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn

# Standard output is for a command's result
console = Console(stderr=True)
SECONDS_BETWEEN_LINES = 30.0


def progress_bar() -> Progress:
    """A bar with title, steps done, time left, and a field `info` for the latest numbers.

    Where standard error is no terminal, and no bar can be redrawn, a line with the same every 30 seconds.
    """
    return (Progress if _shows_bars() else ProgressLines)(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
    )


@contextmanager
def working(title: str) -> Iterator[None]:
    """Where no bar can be redrawn, print a line every 30 seconds in which no bar prints one.

    A command loads and saves models, grades and plots within it, for none of which there is a bar.
    """
    if _shows_bars():
        yield
        return
    started, stopped = time.monotonic(), threading.Event()

    def print_lines() -> None:
        while not stopped.wait(SECONDS_BETWEEN_LINES):
            if all(bar.finished for bar in list(ProgressLines.started)):
                seconds = time.monotonic() - started
                console.print(f"{title}: {_clock(seconds)} so far", highlight=False, markup=False, soft_wrap=True)

    threading.Thread(target=print_lines, daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


class ProgressLines(Progress):
    """Progress in a log file: a line every 30 seconds, also while a step takes longer, and the bar at the end."""

    started: ClassVar[set["ProgressLines"]] = set()

    def start(self) -> None:
        super().start()
        ProgressLines.started.add(self)
        self._stopped = threading.Event()
        threading.Thread(target=self._print_lines, args=(self._stopped,), daemon=True).start()

    def stop(self) -> None:
        if self.live.is_started:
            self._stopped.set()
            ProgressLines.started.discard(self)
        super().stop()

    def _print_lines(self, stopped: threading.Event) -> None:
        while not stopped.wait(SECONDS_BETWEEN_LINES):
            for task in self.tasks:
                if not task.finished:
                    self.console.print(_line(task), highlight=False, markup=False, soft_wrap=True)


def _shows_bars() -> bool:
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def _line(task: Task) -> str:
    """`train on gsm8k: 12 of 200, 0:05:10 so far, 1:20:55 left, reward 0.31`."""
    parts = [f"{task.completed:g} of {task.total or 0:g}", f"{_clock(task.elapsed)} so far"]
    if task.time_remaining is not None:
        parts.append(f"{_clock(task.time_remaining)} left")
    if task.fields["info"]:
        parts.append(task.fields["info"])
    return f"{task.description}: {', '.join(parts)}"


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))
