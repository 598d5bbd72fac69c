"""`logitmix distill`: one model out of a mixture, which loads without logitmix; resuming it; what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitmix import LogitMixForCausalLM
from logitmix.cli.__main__ import main
from logitmix.cli.distill import leaves_members_as_they_are
from logitmix.runs.files import read_jsonl
from logitmix.tasks import Arithmetic
from logitmix.tasks.verify import Grade
from logitmix.training.distillation import LogitMixDistillationConfig
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
    weights = [0.5, 0.3, 0.2]
    LogitMixForCausalLM.from_members(policy, [anchor, policy], weights=weights).save_pretrained(folder / "three")
    torch.manual_seed(2)
    config = LoraConfig(r=4, init_lora_weights=False)
    adapters = LogitMixForCausalLM.from_members(policy, policy, alpha=0.4, peft_config=config)
    adapters.save_pretrained(folder / "adapters")
    return folder


def distil(folders: Path, output: Path, *flags: str, mixture: str = "mixture") -> None:
    assert main(["distill", str(folders / mixture), *FLAGS, "--output_dir", str(output), *flags]) == 0


WITHOUT_LOGITMIX = """
import json, os, sys
sys.modules["logitmix"] = None
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    is_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("1+2=", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    print(json.dumps([type(model).__name__, ids[0].tolist()]))
"""


def generate_without_logitmix(*folders: Path) -> list[list]:
    """The class of each model, and what it generates where logitmix cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_LOGITMIX, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    distil(folders, run, "--save_steps", "2")
    return run


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    """A student with an adapter, on the merged weights of members with a model each."""
    run = tmp_path_factory.mktemp("runs") / "adapter"
    flags = ["--use_peft", "--lora_r", "2", "--save_strategy", "no", "--max_steps", "1"]
    distil(folders, run, *flags, "--student", "merged")
    return run


def test_students_load_where_logitmix_cannot_be_imported(whole, fine_tuned, adapter, on_one_base):
    runs, expected = (whole, fine_tuned, adapter, on_one_base), []
    for folder, kind in zip(runs, [AutoModelForCausalLM] * 2 + [AutoPeftModelForCausalLM] * 2, strict=True):
        model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        expected.append([type(model).__name__, ids[0].tolist()])
    assert generate_without_logitmix(*runs) == expected
    assert [name for name, _ in expected] == ["Qwen2ForCausalLM"] * 2 + ["PeftModelForCausalLM"] * 2


@pytest.mark.parametrize("run", ["whole", "fine_tuned"])
def test_the_student_has_the_weights_of_one_model_and_they_moved(folders, run, request):
    after = load_file(request.getfixturevalue(run) / "model.safetensors")
    before = load_file(folders / "policy" / "model.safetensors")
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


def base_of(run: Path) -> str:
    return json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_the_base_that_is_written_where_there_is_no_folder_of_it(adapter):
    assert base_of(adapter) == str(adapter / "base")


@pytest.fixture(scope="module")
def on_one_base(folders, tmp_path_factory) -> Path:
    """A student with an adapter on the base that the members, adapters, share."""
    run = tmp_path_factory.mktemp("runs") / "on_one_base"
    distil(folders, run, *ON_ONE_BASE, mixture="adapters")
    return run


ON_ONE_BASE = ["--use_peft", "--lora_r", "4", "--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-2"]


def test_a_student_of_adapters_is_an_adapter_on_their_base(capsys, folders, on_one_base, tmp_path):
    assert base_of(on_one_base) == str((folders / "policy").resolve())
    assert not (on_one_base / "base").exists()
    resumed = tmp_path / "resumed"
    shutil.copytree(on_one_base, resumed)
    (resumed / "adapter_model.safetensors").unlink()
    shutil.rmtree(resumed / "checkpoint-2")
    capsys.readouterr()
    distil(folders, resumed, *ON_ONE_BASE, "--resume_from_checkpoint", "true", mixture="adapters")
    assert "GB of weights, which are in memory once." in capsys.readouterr().err
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (on_one_base, resumed))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    saved = load_file(on_one_base / "checkpoint-1" / "adapter_model.safetensors")
    assert any(not torch.equal(expected[name], saved[name]) for name in expected)


def test_a_student_without_room_for_the_members_adapter_has_a_copy(capsys, folders, tmp_path):
    flags = ["--use_peft", "--lora_r", "2", "--max_steps", "1", "--save_strategy", "no"]
    distil(folders, tmp_path / "run", *flags, mixture="adapters")
    assert "The student has weights of its own" in capsys.readouterr().err
    assert (tmp_path / "run" / "base" / "model.safetensors").exists()


def test_a_pair_with_the_scheme_prob_and_another_checkpoint_as_the_student(folders, tmp_path):
    flags = ["--anchor", str(folders / "anchor"), "--scheme", "prob", "--alpha", "0.7", "--beta", "0.5"]
    flags += ["--student", str(folders / "anchor"), "--save_strategy", "no", "--max_steps", "1"]
    distil(folders, tmp_path / "run", *flags, mixture="policy")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_report_is_in_the_runs_folder(capsys, folders, tmp_path):
    run = tmp_path / "run"
    flags = ["--report", "true", "--eval_limit", "8", "--use_peft", "--lora_r", "2", "--save_steps", "1"]
    distil(folders, run, *flags, "--max_steps", "1")
    printed = " ".join(capsys.readouterr().err.split())
    verdict = json.loads((run / "report" / "distillation.jsonl").read_text().splitlines()[0])["verdict"]
    assert verdict in printed
    assert {"README.md", "report.html", "responses.jsonl"} <= {path.name for path in (run / "report").iterdir()}
    distil(folders, run, *flags, "--max_steps", "2", "--resume_from_checkpoint", "true")
    found = {read_jsonl(path)[-1]["arguments"]["step"]: path.parent.name for path in run.glob("report*/run.jsonl")}
    assert found.pop(2) == "report"
    assert found[1].startswith("report-")
    assert "The report of step 1 is now in" in capsys.readouterr().err
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
        ("mixture", ["--teacher_model_name_or_path", "a"], "teacher_model_name_or_path is 'a', but nothing would"),
        ("mixture", ["--max_steps", "0"], "max_steps is 0; it must be above 0"),
        ("mixture", ["--stop_strings", ""], "a stop string is empty"),
        ("three", ["--alpha", "0.3"], "3 members need weights: leave alpha out where a checkpoint has them"),
        ("three", ["--student", "anchor"], "there is no member 'anchor'; the members are policy, anchor_0, anchor_1"),
        ("three", ["--student", "merged"], "but the mixture has 2 anchors; start the student from policy or anchor_0"),
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


def test_a_folder_with_the_name_of_a_member_is_left_out(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    distil(folders, tmp_path / "run", "--student", "anchor", "--max_steps", "1", "--learning_rate", "0")
    assert "The student starts from the mixture's anchor; for the folder, write ./anchor." in capsys.readouterr().err
    found = load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(found, load_file(folders / "anchor" / "model.safetensors"), rtol=0, atol=0)


def test_a_sharded_run_does_not_train_an_adapter_on_the_members_weights(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it
    options = {"output_dir": "run", "use_cpu": True, "bf16": False}
    assert leaves_members_as_they_are(LogitMixDistillationConfig(**options))
    assert not leaves_members_as_they_are(LogitMixDistillationConfig(**options, fsdp=True))
    assert not leaves_members_as_they_are(LogitMixDistillationConfig(**options, use_vllm=True))


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
