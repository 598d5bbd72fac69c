"""`logitmix distill`: one model out of a mixture, which loads without logitmix; resuming it; what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from logitmix import LogitMixForCausalLM
from logitmix.cli.__main__ import main
from logitmix.runs.files import read_jsonl
from logitmix.tasks import Arithmetic
from logitmix.tasks.verify import Grade
from tests.helpers.commands import error_of, save_member

FLAGS = [
    "--task", "arithmetic", "--bf16", "false", "--use_cpu", "true", "--report_to", "none",
    "--max_completion_length", "12", "--logging_steps", "1", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "--train_limit", "24", "--max_steps", "4",
    "--lr_scheduler_type", "constant", "--report", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    policy, anchor = (save_member(folder / name, seed) for seed, name in enumerate(("policy", "anchor")))
    save_member(folder / "letters", 2, alphabet="abc")
    LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4).save_pretrained(folder / "mixture")
    return folder


def distil(folders: Path, output: Path, *flags: str, mixture: str = "mixture") -> None:
    assert main(["distill", str(folders / mixture), *FLAGS, "--output_dir", str(output), *flags]) == 0


WITHOUT_LOGITMIX = """
import sys
sys.modules["logitmix"] = None
from transformers import AutoTokenizer
{load}
tokenizer = AutoTokenizer.from_pretrained({folder!r})
output = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3, do_sample=False)
print(type(model).__name__, output.shape[0])
"""


def generate_without_logitmix(folder: Path, load: str) -> str:
    script = WITHOUT_LOGITMIX.format(load=load.format(folder=str(folder)), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    distil(folders, run, "--save_steps", "2")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("run", ["whole", "fine_tuned"])
def test_the_student_is_one_ordinary_model(folders, run, request):
    whole = request.getfixturevalue(run)
    load = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({folder!r})"
    assert generate_without_logitmix(whole, load) == "Qwen2ForCausalLM 1"
    before, after = load_file(folders / "policy" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_run_folder_is_that_of_a_run(whole):
    (start,) = read_jsonl(whole / "run.jsonl")
    assert start["arguments"]["command"] == "distill"
    assert start["arguments"]["student"] == "policy"
    assert start["data"]["train"]["rows"] == 24
    rows = [row for row in read_jsonl(whole / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (whole / "README.md").exists()
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("lmbda", ["1.0", "0.5"])
def test_a_resumed_run_matches_an_uninterrupted_one(folders, whole, tmp_path, lmbda):
    if lmbda != "1.0":
        whole, original = tmp_path / "whole", whole
        distil(folders, whole, "--save_steps", "2", "--lmbda", lmbda)
        assert original != whole
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for path in (*resumed.glob("*.safetensors"), resumed / "config.json"):
        path.unlink()
    shutil.rmtree(resumed / "checkpoint-4")
    distil(folders, resumed, "--save_steps", "2", "--lmbda", lmbda, "--resume_from_checkpoint", "true")
    expected, found = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    runs = [[r for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r] for folder in (whole, resumed)]
    for row in (*runs[0], *runs[1]):
        row.pop("step_time")
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize("student", ["policy", "merged"])
def test_an_adapter_loads_with_peft_alone(folders, tmp_path, student):
    run = tmp_path / "run"
    distil(folders, run, "--use_peft", "--student", student, "--lora_r", "2", "--save_strategy", "no")
    load = "from peft import AutoPeftModelForCausalLM\nmodel = AutoPeftModelForCausalLM.from_pretrained({folder!r})"
    assert generate_without_logitmix(run, load) == "PeftModelForCausalLM 1"
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run / "base")


def test_a_pair_with_the_scheme_prob_and_another_checkpoint_as_the_student(folders, tmp_path):
    flags = ["--anchor", str(folders / "anchor"), "--scheme", "prob", "--alpha", "0.7", "--beta", "0.5"]
    flags += ["--student", str(folders / "anchor"), "--save_strategy", "no", "--max_steps", "1"]
    distil(folders, tmp_path / "run", *flags, mixture="policy")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_report_is_in_the_runs_folder(capsys, folders, tmp_path):
    run = tmp_path / "run"
    distil(folders, run, "--report", "true", "--eval_limit", "8", "--max_steps", "1", "--use_peft", "--lora_r", "2")
    printed = " ".join(capsys.readouterr().err.split())
    verdict = json.loads((run / "report" / "distillation.jsonl").read_text().splitlines()[0])["verdict"]
    assert verdict in printed
    assert {"README.md", "report.html", "responses.jsonl"} <= {path.name for path in (run / "report").iterdir()}
    argv = ["distill", str(folders / "mixture"), *FLAGS, "--output_dir", str(tmp_path / "few")]
    assert "with 5 problems no difference" in error_of(capsys, [*argv, "--report", "true", "--eval_limit", "5"])
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("mixture", "flags", "message"),
    [
        ("policy", [], "is a single model, and distill takes a mixture: give its anchor with --anchor; TRL's own"),
        ("policy", ["--alpha", "0.3"], "is not a mixture; add --anchor to mix it with"),
        ("nowhere", [], "no model at"),
        ("mixture", ["--student", "{}/letters"], "the members' tokenizers differ: token"),
        ("mixture", ["--student", "{}/mixture"], "is a mixture; a student is one model"),
        ("mixture", ["--student", "nobody"], "no model at 'nobody'"),
        ("mixture", ["--scheme", "prob", "--alpha", "1.5"], "scheme 'prob' needs weights >= 0 that sum to 1"),
        ("mixture", ["--max_completion_length", "300"], "exceeds the members' context of 256"),
        ("mixture", ["--lmbda", "2"], "lmbda is 2.0; it must be between 0"),
        ("mixture", ["--beta", "-1"], "beta must be in [0.0, 1.0], got -1.0"),
        ("mixture", ["--template", "boxed"], "chat template"),
        ("mixture", ["--eval_strategy", "steps", "--eval_steps", "1"], "evaluate the student with logitmix eval"),
        ("mixture", ["--lora_r", "4"], "lora_r is 4, but there is no adapter; add --use_peft"),
        ("mixture", ["--train_limit", "4"], "the data set has 4 prompts, fewer than the 8 of an update"),
        ("mixture", ["--method", "gkd"], "method"),
        ("mixture", ["--samples_per_prompt", "2"], "samples_per_prompt is 2, but method on_policy samples for each"),
        ("mixture", ["--method", "sft", "--samples_per_prompt", "0"], "samples_per_prompt is 0"),
        ("mixture", ["--method", "sft", "--lmbda", "0.5"], "lmbda is 0.5, but method sft, which trains by SFT"),
        ("mixture", ["--method", "sft", "--top_p", "0.9"], "top_p is 0.9, but method sft"),
        ("mixture", ["--method", "sft", "--use_vllm", "true"], "use_vllm is True, but method sft"),
        ("mixture", ["--method", "sft", "--max_completion_length", "300"], "exceeds the members' context of 256"),
        ("mixture", ["--method", "sft", "--train_limit", "2"], "none of the 8 samples is right in the task's format"),
    ],
)
def test_bad_input_is_one_error_line(capsys, folders, tmp_path, mixture, flags, message):
    flags = [flag.format(folders) for flag in flags]
    argv = ["distill", str(folders / mixture), *FLAGS, "--output_dir", str(tmp_path / "run"), *flags]
    assert message in error_of(capsys, argv)
    assert not (tmp_path / "run" / "run.jsonl").exists()


def test_a_folder_that_holds_a_run_is_refused(capsys, folders, whole):
    assert "holds another run" in error_of(
        capsys, ["distill", str(folders / "mixture"), *FLAGS, "--output_dir", str(whole)]
    )


# --- method sft -------------------------------------------------------------------------------------------------


class EverySampleIsRight(Arithmetic):
    """A task that an untrained model is right in, where its response ends."""

    name = "every_sample_is_right"

    def grade(self, response, problem):
        right = "3" not in response
        return Grade(right, right, right, None, None)


SFT = ["--method", "sft", "--task", f"{__name__}.EverySampleIsRight", "--samples_per_prompt", "3"]


@pytest.fixture(scope="module")
def fine_tuned(folders, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sft"
    distil(folders, run, *SFT, "--save_steps", "2")
    return run


def test_sft_trains_on_the_right_samples_that_ended(folders, fine_tuned):
    samples = read_jsonl(fine_tuned / "samples" / "responses.jsonl")
    assert len(samples) == 3 * 24
    assert len({row["response"] for row in samples}) > 24, "samples, not one greedy response three times"
    kept = [row for row in samples if row["answer_ok"] and not row["truncated"]]
    assert 0 < len(kept) < len([row for row in samples if not row["truncated"]]) < len(samples)
    (start,) = read_jsonl(fine_tuned / "run.jsonl")
    assert start["arguments"]["method"] == "sft"
    assert start["data"]["train"]["rows"] == len(kept)
    before = load_file(folders / "policy" / "model.safetensors")
    after = load_file(fine_tuned / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert len([row for row in read_jsonl(fine_tuned / "metrics.jsonl") if "loss" in row]) == 4


def test_interrupted_sampling_continues_with_the_same_samples(folders, fine_tuned, tmp_path):
    run = tmp_path / "again"
    shutil.copytree(fine_tuned / "samples", run / "samples")
    path = run / "samples" / "responses.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    distil(folders, run, *SFT, "--save_strategy", "no")
    assert path.read_bytes() == whole
    expected, found = load_file(fine_tuned / "model.safetensors"), load_file(run / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_resumed_sft_matches_an_uninterrupted_one(folders, fine_tuned, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(fine_tuned, resumed)
    (resumed / "model.safetensors").unlink()
    shutil.rmtree(resumed / "checkpoint-4")
    distil(folders, resumed, *SFT, "--save_steps", "2", "--resume_from_checkpoint", "true")
    expected, found = load_file(fine_tuned / "model.safetensors"), load_file(resumed / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_samples_of_another_temperature_are_not_continued(capsys, folders, fine_tuned, tmp_path):
    shutil.copytree(fine_tuned / "samples", tmp_path / "run" / "samples")
    argv = ["distill", str(folders / "mixture"), *FLAGS, *SFT, "--output_dir", str(tmp_path / "run")]
    message = error_of(capsys, [*argv, "--temperature", "0.5"])
    assert "was started with temperature 1.0, now 0.5; continue it with the same arguments" in message
