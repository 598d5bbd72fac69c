"""Every command of docs/first_hour.md, on the model that it fetches; skipped where the registry cannot be reached."""

import json
import re
import shlex
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from logitmix.cli.__main__ import main
from logitmix.paper.example_models import fetch_example
from tests.helpers.paths import ROOT
from tests.helpers.servers import TransformersServer

ARMS = {
    "adaptive_mixing": ["--anchor", "runs/words-sft", "--alpha_controller", "adaptive", "--validation_size", "2"],
    "prob_mixing": ["--anchor", "runs/words-sft", "--scheme", "prob"],
    "base_anchor": ["--anchor", "models/smollm2"],
    "grpo": ["--loss_type", "grpo"],
    "grpo_kl": ["--loss_type", "grpo", "--beta", "0.01"],
}  # fixed mixing is the page's own

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
def test_every_command_of_the_first_hour_runs_then_each_arm_eval_and_a_server(working_directory, monkeypatch, capsys):
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
    train = next(flags for _, verb, *flags in commands() if verb == "train")
    for arm, changes in ARMS.items():
        anchor = train.index("--anchor")
        flags = [*train[:anchor], *train[anchor + 2 :], *SMALLER["train"], *changes, "--output_dir", f"runs/{arm}"]
        if "--anchor" not in changes:  # from the SFT model, whose adapter goes on
            flags[flags.index("--model_name_or_path") + 1] = "runs/words-sft"
            flags.remove("--use_peft")
        assert main(["train", *flags]) == 0, (arm, capsys.readouterr().err[-2000:])
    flags = ["--eval_limit", "20", "--max_new_tokens", "8", "--output_dir", "runs/eval"]
    assert main(["eval", "--model_name_or_path", "runs/words-mixing", *flags]) == 0
    rows = [json.loads(line) for line in Path("runs/eval/responses.jsonl").read_text().splitlines()]
    assert Counter(row["name"] for row in rows) == {"policy": 20, "anchor": 20, "mixture": 20}
    if find_spec("fastapi") is None:
        warnings.warn("not served: what that needs is not installed, pip install 'logitmix[serve]'", stacklevel=1)
    else:
        answer_without_vllm(Path("runs/words-mixing"))


def answer_without_vllm(folder: Path) -> None:
    """The trained mixture, as `logitmix serve` answers a chat where there is no vLLM."""
    import httpx

    server = TransformersServer(folder, Path("log.txt"))
    try:
        question = {"model": "mixture", "messages": [{"role": "user", "content": "What is 2+3?"}], "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=600)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
    finally:
        server.kill()
