"""Progress of long commands: a bar on a terminal, lines in a file."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from logitmix.cli.__main__ import main
from logitmix.runs import console as module
from logitmix.runs.console import ProgressLines, progress_bar
from tests.helpers.commands import TINY


@pytest.fixture
def log(monkeypatch):
    """What a command prints into a file, in which a line of progress is due every 10 ms."""
    file = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=file, width=80))
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.01)
    return file


def wait_for(text: str, log: io.StringIO) -> None:
    deadline = time.monotonic() + 60
    while text not in log.getvalue():
        assert time.monotonic() < deadline, f"{text!r} is not in {log.getvalue()!r}"
        time.sleep(0.005)


def test_a_line_is_due_every_30_seconds():
    assert module.SECONDS_BETWEEN_LINES == 30


def test_a_file_gets_lines_also_while_a_step_takes_long(log):
    with progress_bar() as bar:
        assert isinstance(bar, ProgressLines)
        row = bar.add_task("mix [logit]", total=200, completed=0, info="")
        wait_for("mix [logit]: 0 of 200, 0:00:00 so far\n", log)
        bar.advance(row, 64)
        bar.update(row, info="reward 0.31")
        wait_for("mix [logit]: 64 of 200, 0:00:0", log)
        wait_for(", reward 0.31\n", log)
        assert "\x1b" not in log.getvalue()
    printed = log.getvalue()
    time.sleep(0.05)
    assert log.getvalue() == printed, "it prints after its end"
    bar.stop()


def test_a_bar_that_starts_again_prints_again(log):
    """As when a trainer trains twice."""
    bar = progress_bar()
    bar.stop()
    for title in ("first", "second"):
        bar.start()
        bar.add_task(title, total=2, info="")
        wait_for(f"{title}: 0 of 2", log)
        bar.stop()


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), force_terminal=True))
    assert type(progress_bar()) is Progress


def test_a_training_in_a_file_prints_its_steps(log, members, tmp_path):
    base, sft = members
    command = ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run")]
    assert main([*command, *TINY, "--max_steps", "2"]) == 0
    assert "train on arithmetic: 0 of 2, 0:00:0" in log.getvalue()


def test_an_evaluation_in_a_file_prints_the_responses_so_far(log, members):
    assert main(["eval", "--model_name_or_path", members[0], "--eval_limit", "4", "--max_new_tokens", "200"]) == 0
    assert " of 4, 0:00:0" in log.getvalue()
