"""Progress of long commands: a bar on a terminal, lines in a file."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from logitmix.cli.__main__ import main
from logitmix.runs import console as module
from logitmix.runs.console import ProgressLines, progress_bar, working
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


def test_work_without_a_bar_prints_lines_while_no_bar_does(log):
    with working("logitmix eval"):
        wait_for("logitmix eval: 0:00:00 so far\n", log)
        with progress_bar() as bar:
            row = bar.add_task("eval", total=2, info="")
            time.sleep(0.05)  # a line may have been on its way
            before = log.getvalue().count("logitmix eval:")
            time.sleep(0.1)
            assert log.getvalue().count("logitmix eval:") == before
            bar.advance(row, 2)
            count = log.getvalue().count("logitmix eval:")
            deadline = time.monotonic() + 60
            while log.getvalue().count("logitmix eval:") == count:  # as while a training saves its model
                assert time.monotonic() < deadline
    printed = log.getvalue()
    time.sleep(0.05)
    assert log.getvalue().count("\n") - printed.count("\n") <= 1


def test_a_terminal_gets_no_lines(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=file, force_terminal=True))
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.01)
    with working("logitmix eval"):
        time.sleep(0.05)
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "1+1", "--max_new_tokens", "8"],
        ["eval", "--eval_limit", "2", "--max_new_tokens", "8"],
        ["sweep", "--eval_limit", "2", "--max_new_tokens", "8", "--alphas", "0.5"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_command_prints_while_it_loads_models(argv, log, members, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--model_name_or_path", members[0], "--anchor", members[1]]) == 0
    assert f"logitmix {argv[0]}: 0:00:0" in log.getvalue()


def test_one_of_several_processes_prints(log, members, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", "1+1", "--model_name_or_path", members[0], "--anchor", members[1]]) == 0
    assert "logitmix inspect:" not in log.getvalue()
