"""Every command of docs/first_hour.md, on the model that it fetches; skipped where the registry cannot be reached."""

import re
import shlex
import time
from pathlib import Path

import pytest

from logitmix.cli.__main__ import main
from logitmix.paper.example_models import fetch_example
from tests.helpers.paths import ROOT

# Sizes of the page, made smaller: the test checks that the commands work
SMALLER = {
    "check-task": ["--num_questions", "2", "--max_new_tokens", "8"],
    "sft": ["--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no"],
    "complement": ["--eval_limit", "6", "--max_new_tokens", "8"],
    "sweep": ["--eval_limit", "4", "--max_new_tokens", "8"],
    "realign": ["--eval_limit", "4", "--num_samples", "2", "--max_new_tokens", "8"],
    "train": ["--max_steps", "2", "--per_device_train_batch_size", "4", "--num_generations", "2",
              "--max_completion_length", "8", "--save_strategy", "no"],
}  # fmt: skip


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "first_hour.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory):
    """A folder with the fetched model at the path of the page."""
    pytest.importorskip("gguf", reason="needs the package gguf: pip install -e '.[examples]'")
    folder = tmp_path_factory.mktemp("first-hour")
    try:
        fetch_example("smollm2", folder / "models" / "smollm2")
    except ValueError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
    return folder


@pytest.mark.slow
def test_every_command_of_the_first_hour_runs(working_directory, monkeypatch, capsys):
    monkeypatch.chdir(working_directory)
    seen = []
    for program, verb, *flags in commands():
        if program == "logitmix":
            started = time.monotonic()
            assert main([verb, *flags, *SMALLER.get(verb, [])]) == 0, (verb, capsys.readouterr().err[-2000:])
            seen.append(verb)
            print(f"{verb}: {time.monotonic() - started:.0f} s")
    expected = ["fetch-example", "check-task", "sft", "complement", "sweep", "realign", "train", "report", "export"]
    assert seen == expected
    assert Path("models/words-policy/model.safetensors").exists()
    assert Path("report/report.html").exists()
