"""The command line: what commands write, and the errors they print for wrong input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from logitmix.cli.__main__ import main
from logitmix.evaluation.outcomes import unpack
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.recipes import TITLES
from logitmix.runs.files import read_jsonl
from logitmix.tasks import Arithmetic
from logitmix.training.task_trainer import split_validation
from tests.helpers.commands import TINY, error_of, save_member
from tests.helpers.paths import ROOT


@pytest.fixture
def train(members, tmp_path):
    """Arguments of a tiny training, into tmp_path / "run"."""
    base, sft = members
    return ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run"), *TINY]


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


@pytest.mark.slow
def test_the_quickstart_reports_every_arm(tmp_path, capsys):
    folder = tmp_path / "quickstart"
    sizes = ["--base_steps", "12", "--sft_steps", "6", "--rl_steps", "2", "--questions", "4", "--eval_limit", "8"]
    assert main(["quickstart", "--output_dir", str(folder), "--arms", "all", "--eval_every", "1", *sizes]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    reported = {row["name"].split(":")[0] for row in rows if row["what"] == "final"}
    assert set(TITLES.values()) < reported
    starts = {arm: json.loads((folder / arm / "config.json").read_text())["model_type"] for arm in TITLES}
    assert starts == {arm: "qwen2" if arm.startswith("grpo") else "logitmix" for arm in TITLES}


def test_an_unknown_arm_suggests_the_nearest_one(capsys, tmp_path):
    message = error_of(capsys, ["quickstart", "--arms", "fixed_mix", "--output_dir", str(tmp_path / "q")])
    assert "there is no arm 'fixed_mix'; did you mean 'fixed_mixing'?" in message


def test_sft_makes_a_checkpoint_that_plain_transformers_loads(members, tmp_path):
    out = tmp_path / "anchor"
    assert main([
        "sft", "--model_name_or_path", members[0], "--output_dir", str(out), "--train_limit", "64", "--max_steps", "2",
        "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no",
    ]) == 0  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen2"
    assert json.loads((out / "run.jsonl").read_text())["arguments"]["max_steps"] == 2


def test_flags_override_the_config_file(train, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("alpha: 0.25\nscheme: prob\nmax_steps: 5\n")
    assert main([*train, "--config", str(recipe), "--max_steps", "1"]) == 0
    arguments = json.loads((tmp_path / "run" / "run.jsonl").read_text())["arguments"]
    assert (arguments["alpha"], arguments["scheme"], arguments["max_steps"]) == (0.25, "prob", 1)
    assert LogitMixForCausalLM.from_pretrained(tmp_path / "run").config.scheme == "prob"


def test_an_interrupted_training_saves_a_checkpoint_and_the_printed_command_continues_it(train, tmp_path):
    command = [sys.executable, "-m", "logitmix.cli", *train, "--max_steps", "400"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "500"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline, "no step was taken"
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=480)
    assert process.returncode == 130, stderr
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    (printed,) = [line.strip() for line in stderr.splitlines() if line.endswith("--resume_from_checkpoint true")]
    assert printed.startswith("logitmix train ")
    assert main([*printed.split()[1:], "--max_steps", str(step + 1)]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1] == step + 1
    starts = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [start["resumed_from"] for start in starts] == [None, str(checkpoint)]


def test_an_output_folder_that_holds_another_run_is_left_alone(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.jsonl").write_text("{}")
    message = error_of(capsys, [*train, "--max_steps", "1"])
    assert "holds another run" in message
    assert "continue that run with --resume_from_checkpoint true" in message
    message = error_of(capsys, ["quickstart", "--output_dir", str(tmp_path / "run")])
    assert message.endswith("choose another --output_dir, or remove it"), "the quickstart is not resumed"
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
        (["--train_limit", "0"], "--train_limit is 0, but must be at least 1"),
        (["--per_device_train_batch_size", "6"], "divisible by num_generations"),
        (["--beta", "0.01"], "beta"),
        (["--config", "missing.yaml"], "there is no config file 'missing.yaml'"),
        (["--config"], "needs the path"),
        (["--max_steps", "0"], "max_steps is 0; it must be above 0, or -1"),
        (["--epsilon", "-1"], "epsilon is -1.0; it must be at least 0"),
        (["--rollout_batch_size", "0"], "rollout_batch_size is 0, but must be at least 1"),
        (["--loss_type", "groups"], "loss_type is 'groups'; it must be one of 'group', 'grpo'"),
        (["--eval_every", "0"], "--eval_every is 0, but must be at least 1"),
        (["--eval_limit", "-3"], "--eval_limit is -3, but must be at least 1"),
        (["--num_completions_to_save", "-1"], "--num_completions_to_save is -1, but must be at least 0"),
        (["--validation_source", "train"], "alpha_controller 'fixed' validates nothing"),
        (["--adaptive_scale", "10"], "adaptive_scale is 10.0, but nothing would read it"),
        (["--max_refills", "5"], "max_refills is 5, but nothing would read it: it goes with dynamic_sampling"),
        (["--loss_head", "reference", "--anchor_states", "offload"], "it goes with loss_head 'fused'"),
        pytest.param(
            ["--attn_implementation", "flash_attention_2"],
            "package for FlashAttention2 doesn't seem to be installed",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="it is installed"),
        ),
    ],
)
def test_wrong_input_prints_one_error_line(train, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, [*train, *flags])
    assert not (tmp_path / "run" / "run.jsonl").exists(), "the run was not started"


def test_an_unknown_config_key_suggests_the_nearest_one(train, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_generation: 4\n")
    message = error_of(capsys, [*train, "--config", str(recipe)])
    assert "unknown key 'num_generation' in the config file; did you mean 'num_generations'?" in message


def test_members_with_different_tokenizers_are_rejected(members, train, tmp_path, capsys):
    other = save_member(tmp_path / "other", 1, Arithmetic.alphabet[::-1])
    message = error_of(capsys, [*train, "--anchor", other])
    assert "tokenizers differ: token 2" in message


def test_an_empty_data_set_is_rejected(train, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "test.jsonl").write_text("")
    assert "logitmix: error" in error_of(capsys, [*train, "--task", "hendrycks_math", "--data", str(tmp_path)])


def test_running_out_of_memory_prints_one_error_line(monkeypatch, capsys):
    def run_out(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("logitmix.cli.eval.main", run_out)
    assert "Tried to allocate 2.00 GiB. Process fewer sequences at a time" in error_of(capsys, ["eval"])


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version(argv, capsys):
    assert main(argv) == 0
    assert "logitmix" in capsys.readouterr().out


def test_an_unknown_command_suggests_the_nearest_one(capsys):
    assert "did you mean 'train'" in error_of(capsys, ["trian"])


def test_importing_logitmix_loads_neither_trl_nor_vllm():
    code = "import sys, logitmix; assert not {'trl', 'vllm', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tasks_need_no_torch():
    code = "import sys, logitmix.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_holds_a_model_is_not_overwritten(members, capsys):
    base = Path(members[0])
    before = (base / "model.safetensors").read_bytes()
    argv = [
        "sft",
        "--model_name_or_path",
        str(base),
        "--output_dir",
        str(base),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    assert "holds another run (config.json)" in error_of(capsys, argv)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def run_of_two_steps(members, tmp_path_factory) -> list[str]:
    """The flags of a finished run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    base, sft = members
    flags = ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(folder), *TINY[:-2]]
    flags += ["--save_steps", "1", "--eval_every", "1", "--eval_limit", "2"]
    assert main([*flags, "--max_steps", "2"]) == 0
    return flags


def test_resuming_with_other_arguments_is_rejected(run_of_two_steps, capsys):
    resume = [*run_of_two_steps, "--resume_from_checkpoint", "true", "--max_steps", "3", "--alpha", "0.8"]
    assert "was started with alpha None, now 0.8; continue it with the same arguments" in error_of(capsys, resume)


def test_resuming_a_finished_run_writes_the_model_again(run_of_two_steps):
    folder = Path(run_of_two_steps[run_of_two_steps.index("--output_dir") + 1])
    before = [(folder / name).read_bytes() for name in ("model.safetensors", "evaluations.jsonl", "completions.jsonl")]
    (folder / "model.safetensors").unlink()
    assert main([*run_of_two_steps, "--resume_from_checkpoint", "true", "--max_steps", "2"]) == 0
    after = [(folder / name).read_bytes() for name in ("model.safetensors", "evaluations.jsonl", "completions.jsonl")]
    assert after == before


def test_resuming_past_the_last_step_is_rejected(run_of_two_steps, capsys):
    resume = [*run_of_two_steps, "--resume_from_checkpoint", "true", "--max_steps", "1"]
    assert "is at step 2 and max_steps is 1; raise --max_steps" in error_of(capsys, resume)


def test_resuming_another_runs_checkpoint_is_rejected(run_of_two_steps, tmp_path, capsys):
    folder = run_of_two_steps[run_of_two_steps.index("--output_dir") + 1]
    resume = [*run_of_two_steps, "--output_dir", str(tmp_path), "--resume_from_checkpoint", f"{folder}/checkpoint-1"]
    assert "does not belong to the run in" in error_of(capsys, resume)


def test_resuming_from_an_earlier_checkpoint_repeats_its_steps(run_of_two_steps):
    folder = Path(run_of_two_steps[run_of_two_steps.index("--output_dir") + 1])
    checkpoint = str(folder / "checkpoint-1")
    assert main([*run_of_two_steps, "--max_steps", "3", "--resume_from_checkpoint", checkpoint]) == 0
    assert len(list(folder.glob("abandoned-*/checkpoint-2"))) == 1, "its step was repeated"
    logs = read_jsonl(folder / "metrics.jsonl")
    assert [log["step"] for log in logs if "reward" in log] == [1, 2, 3]
    assert [log["step"] for log in logs if "train_runtime" in log] == [3]
    rows = read_jsonl(folder / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(4) for _ in range(3)]
    anchors = [{k: v for k, v in row.items() if k != "step"} for row in rows if row["name"] == "anchor"]
    assert all(row == anchors[0] for row in anchors), "the anchor is frozen"
    completions = read_jsonl(folder / "completions.jsonl")
    assert [row["step"] for row in completions] == [step for step in (1, 2, 3) for _ in range(16)]


def test_a_run_records_its_origin(run_of_two_steps):
    folder = Path(run_of_two_steps[run_of_two_steps.index("--output_dir") + 1])
    start = read_jsonl(folder / "run.jsonl")[0]
    assert start["arguments"]["seed"] == 42
    assert (start["arguments"]["alpha"], start["resolved"]["alpha"]) == (None, 0.5)
    assert start["data"]["train"]["rows"] == 64
    assert start["versions"]["trl"].startswith("1.16")
    rows = read_jsonl(folder / "completions.jsonl")[:4]
    assert len({row["prompt"] for row in rows}) == 1, "the completions of a question are consecutive"
    rewards = [row["task_reward"] for row in rows]
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-5)
    assert [row["advantage"] > 0 for row in rows] == [reward > sum(rewards) / 4 for reward in rewards]


def test_resuming_on_other_data_is_rejected(members, tmp_path, capsys):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, sft = members
    flags = ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(tmp_path / "run"), *TINY[:-4]]
    flags += ["--task", "jsonl", "--data", str(data), "--template", "boxed_line", "--max_steps", "2"]
    assert main([*flags, "--save_steps", "1"]) == 0
    data.write_text(data.read_text().replace("What is 7 +", "What is 7 plus"))
    message = error_of(capsys, [*flags, "--resume_from_checkpoint", "true"])
    assert "was started on" in message
    assert "resume it on the same data" in message


def test_the_documented_metrics_are_logged(train, tmp_path):
    assert main([*train, "--dynamic_sampling", "filter", "--max_steps", "1"]) == 0
    log = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    page = (ROOT / "docs" / "runs.md").read_text()
    table = page.split("## What is logged each step")[1].split("\n## ")[0]
    names = []
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`(.*?)`", row):
            prefix = names[-1].rsplit("/", 1)[0] if names else ""
            names.append(name.replace("…", prefix).replace("<function>", "task_reward"))
    missing = {"time/validation"}  # without a controller that validates
    assert len(names) > 25
    assert set(names) - set(log) == missing


def test_the_model_card_shows_how_to_load_the_mixture(run_of_two_steps):
    folder = Path(run_of_two_steps[run_of_two_steps.index("--output_dir") + 1])
    card = (folder / "README.md").read_text()
    assert "None" not in card
    assert "LogitMixForCausalLM.from_pretrained" in card


@pytest.mark.parametrize("source", ["held_out", "train"])
def test_an_adaptive_alpha_from_the_command_line(train, tmp_path, source):
    flags = ["--alpha_controller", "adaptive", "--validation_size", "6", "--adaptive_offset", "1"]
    assert main([*train, *flags, "--validation_source", source, "--max_steps", "2"]) == 0
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [log for log in logs if "validation/s3" in log]
    assert [row["alpha"] for row in rows] == [0.5, pytest.approx(1 / (1 + math.exp(-rows[0]["validation/s3"])))]
    assert all(row["time/validation"] > 0 for row in rows)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["weights"][1] == pytest.approx(1 / (1 + math.exp(-rows[1]["validation/s3"])))


def test_held_out_problems_come_after_the_training_problems():
    task = Arithmetic()
    problems, validation = split_validation(task, 10, 4)
    assert problems == task.problems("train", 10)
    assert problems + validation == task.problems("train", 14)
    everything = task.problems("train")
    problems, validation = split_validation(task, None, 4)
    assert problems == everything[:-4]
    assert validation == everything[-4:]
    assert split_validation(task, None, 0) == (everything, [])
    with pytest.raises(ValueError, match=f"validation_size is {len(everything)}, but arithmetic has"):
        split_validation(task, None, len(everything))


@pytest.mark.slow
@pytest.mark.parametrize("eval_limit", [4, 1])
def test_two_processes_train_and_evaluate_as_one_run(members, tmp_path, eval_limit):
    """Also with fewer test problems than processes."""
    base, sft = members
    out = tmp_path / "two"
    flags = ["train", "--model_name_or_path", base, "--anchor", sft, "--output_dir", str(out), *TINY]
    flags += ["--eval_every", "1", "--eval_limit", str(eval_limit), "--max_steps", "1"]
    flags += ["--per_device_train_batch_size", "8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, "-m", "logitmix.cli", *flags], capture_output=True, text=True, timeout=960)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((out / "run.jsonl").read_text().splitlines()) == 1
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["n"]) for row in rows] == [(step, eval_limit) for step in (0, 1) for _ in range(3)]
    for row in rows:
        assert unpack(row["answer_ok"], eval_limit).mean() == pytest.approx(row["answer"])


@pytest.mark.parametrize("verb", ["sft", "train", "eval"])
def test_a_model_that_does_not_exist(verb, tmp_path, capsys):
    flags = [] if verb == "eval" else ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path / "run")]
    for path in ("no/such/model", str(tmp_path)):
        assert f"no model at '{path}'" in error_of(capsys, [verb, "--model_name_or_path", path, *flags])


def test_a_model_without_a_tokenizer(members, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(members[0]).save_pretrained(tmp_path / "bare")
    message = error_of(capsys, ["eval", "--model_name_or_path", str(tmp_path / "bare"), "--eval_limit", "1"])
    assert "no tokenizer at" in message


def test_alpha_without_an_anchor_is_rejected(members, tmp_path, capsys):
    argv = [
        "train",
        "--model_name_or_path",
        members[0],
        "--output_dir",
        str(tmp_path / "run"),
        "--alpha",
        "0.9",
        *TINY,
    ]
    assert "there is no anchor to mix with" in error_of(capsys, argv)


def test_fewer_questions_than_a_step_needs_are_rejected(train, capsys):
    assert "the data set has 2 questions, fewer than the 4" in error_of(capsys, [*train, "--train_limit", "2"])


def test_a_run_that_diverges_prints_one_error_line_and_saves_the_batch(train, tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    message = error_of(capsys, [*train, "--learning_rate", "1e38", "--max_grad_norm", "0", "--max_steps", "3"])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert "stopped, with the weights as they were before it" in message
    assert list((tmp_path / "run").glob("nonfinite-step-*/rank-0.pt"))
