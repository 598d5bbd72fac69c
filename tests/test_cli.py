"""The command line: what it makes, and how it answers wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from logitmix.cli import main
from logitmix.commands.quickstart import character_tokenizer, tiny_model
from logitmix.modeling import LogitMixForCausalLM
from logitmix.tasks import Arithmetic

TINY = [
    "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--max_completion_length", "24", "--logging_steps",
    "1", "--per_device_train_batch_size", "16", "--num_generations", "4", "--learning_rate", "1e-4", "--train_limit",
    "64", "--save_strategy", "no",
]  # fmt: skip


def save_member(folder: Path, seed: int, alphabet: str = Arithmetic.alphabet) -> str:
    tokenizer = character_tokenizer(alphabet)
    torch.manual_seed(seed)
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("members")
    return save_member(folder / "base", 0), save_member(folder / "sft", 1)


@pytest.fixture
def train(members, tmp_path):
    """Arguments of a tiny training, into tmp_path / "run"."""
    base, sft = members
    return ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run"), *TINY]


def error_of(capsys, argv) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith("logitmix: error: ")
    assert "Traceback" not in captured.err
    return message


@pytest.mark.slow
def test_the_quickstart_runs_from_nothing_to_a_report(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    sizes = ["--base_steps", "12", "--sft_steps", "6", "--rl_steps", "2", "--questions", "4", "--eval_limit", "8"]
    assert main(["quickstart", "--output_dir", str(folder), "--eval_every", "1", *sizes]) == 0
    printed = capsys.readouterr().out
    assert "GRPO+KL" in printed
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row["what"] == "sweep"]) == 22
    assert {row["n"] for row in rows} == {8}
    for picture in ("sweep.png", "curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    mixture = AutoModelForCausalLM.from_pretrained(folder / "fixed_mixing")
    assert isinstance(mixture, LogitMixForCausalLM)
    assert main(["eval", "--model_name_or_path", str(folder / "fixed_mixing"), "--eval_limit", "4"]) == 0
    assert main(["quickstart", "--output_dir", str(folder)]) == 2, "it holds a run already"


def test_sft_makes_a_checkpoint_that_plain_transformers_loads(members, tmp_path):
    out = tmp_path / "anchor"
    assert main([
        "sft", "--model_name_or_path", members[0], "--output_dir", str(out), "--train_limit", "64", "--max_steps", "2",
        "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no",
    ]) == 0  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen2"
    assert json.loads((out / "run.jsonl").read_text())["arguments"]["max_steps"] == 2


def test_flags_go_over_the_config_file(train, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("alpha: 0.25\nscheme: prob\nmax_steps: 5\n")
    assert main([*train, "--config", str(recipe), "--max_steps", "1"]) == 0
    arguments = json.loads((tmp_path / "run" / "run.jsonl").read_text())["arguments"]
    assert (arguments["alpha"], arguments["scheme"], arguments["max_steps"]) == (0.25, "prob", 1)
    assert LogitMixForCausalLM.from_pretrained(tmp_path / "run").config.scheme == "prob"


def test_a_training_that_is_interrupted_saves_a_checkpoint_and_the_printed_command_continues_it(train, tmp_path):
    command = [sys.executable, "-m", "logitmix.cli", *train, "--max_steps", "400"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "500"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline, "no step was taken"
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    printed = next(line.strip() for line in stderr.splitlines() if line.strip().startswith("logitmix train"))
    assert printed.endswith("--resume_from_checkpoint true")
    assert main([*printed.split()[1:], "--max_steps", str(step + 1)]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == step + 1
    starts = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [start["resumed_from"] for start in starts] == [None, str(checkpoint)]


def test_an_output_folder_that_holds_another_run_is_left_alone(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.jsonl").write_text("{}")
    assert "holds another run" in error_of(capsys, [*train, "--max_steps", "1"])
    assert (tmp_path / "run" / "run.jsonl").read_text() == "{}"


def test_resuming_without_a_checkpoint(train, capsys):
    assert "no checkpoint to resume from" in error_of(capsys, [*train, "--resume_from_checkpoint", "true"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--scheme", "prob", "--alpha", "-0.5"], "alpha is -0.5; training needs 0 <= alpha < 1"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--alpha", "1"], "alpha is 1.0; training needs 0 <= alpha < 1"),
        (["--alpha", "5"], "alpha is 5.0; training needs 0 <= alpha < 1"),
        (["--dtype", "flaot32"], "invalid choice: 'flaot32'"),
        (["--eval_strategy", "steps"], "--eval_every"),
        (["--anchor", "no/such/anchor"], "no model at 'no/such/anchor'"),
        (["--task", "arithmetics"], "did you mean 'arithmetic'"),
        (["--max_completion_length", "250"], "exceeds the members' context of 256"),
        (["--train_limit", "0"], "limit is 0"),
        (["--per_device_train_batch_size", "6"], "divisible by num_generations"),
        (["--beta", "0.01"], "beta"),
        (["--config", "missing.yaml"], "there is no config file 'missing.yaml'"),
        (["--config"], "needs the path"),
    ],
)
def test_wrong_input_is_answered_by_one_sentence(train, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, [*train, *flags])
    assert not (tmp_path / "run" / "run.jsonl").exists(), "the run was not started"


def test_an_unknown_config_key_is_answered_with_the_nearest_valid_one(train, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_generation: 4\n")
    message = error_of(capsys, [*train, "--config", str(recipe)])
    assert "unknown key 'num_generation' in the config file; did you mean 'num_generations'?" in message


def test_members_with_different_tokenizers_are_refused(members, train, tmp_path, capsys):
    other = save_member(tmp_path / "other", 1, Arithmetic.alphabet[::-1])
    message = error_of(capsys, [*train, "--anchor", other])
    assert "tokenizers differ: token 2" in message


def test_an_empty_data_set_is_refused(train, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "test.jsonl").write_text("")
    assert "logitmix: error" in error_of(capsys, [*train, "--task", "hendrycks_math", "--data", str(tmp_path)])


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version(argv, capsys):
    assert main(argv) == 0
    assert "logitmix" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys):
    assert "did you mean 'train'" in error_of(capsys, ["trian"])


def test_importing_logitmix_loads_neither_trl_nor_vllm():
    code = "import sys, logitmix; assert not {'trl', 'vllm', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tasks_need_no_torch():
    code = "import sys, logitmix.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
