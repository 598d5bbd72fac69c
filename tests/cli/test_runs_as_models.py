"""The folder of a run that has not finished is read as its newest complete checkpoint, in every command."""

import shutil

import pytest

from logitmix.cli.__main__ import main
from tests.helpers.commands import TINY, error_of


@pytest.fixture(scope="module")
def interrupted(members, tmp_path_factory):
    """A run that was killed after its second checkpoint, while it wrote the third."""
    base, sft = members
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([
        "train", "--model_name_or_path", base, "--anchor", sft, "--alpha", "0.7", "--output_dir", str(run), *TINY,
        "--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps", "--gradient_accumulation_steps", "1",
        "--steps_per_generation", "1",
    ]) == 0  # fmt: skip
    for path in {*run.glob("*.safetensors"), *run.glob("*config.json"), *run.glob("tokenizer*")}:
        path.unlink()
    shutil.copytree(run / "checkpoint-2", run / ".saving" / "checkpoint-3")
    return run


EVAL = ["--task", "arithmetic", "--eval_limit", "6", "--max_new_tokens", "4"]


@pytest.mark.parametrize(
    "command",
    [
        lambda run, out: ["eval", "--model_name_or_path", run, *EVAL],
        lambda run, out: ["complement", run, *EVAL],
        lambda run, out: ["export", "--model_name_or_path", run, "--output_dir", out],
        lambda run, out: ["sweep", "--model_name_or_path", run, "--alphas", "0.5", "--output_dir", out, *EVAL],
        lambda run, out: ["inspect", "--model_name_or_path", run, "--question", "7+8-9+4=?", "--max_new_tokens", "4"],
    ],
    ids=["eval", "complement", "export", "sweep", "inspect"],
)
def test_the_newest_checkpoint_is_used_and_named(interrupted, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    status = main(command(str(interrupted), str(tmp_path / "out")))
    shown = " ".join(capsys.readouterr().err.split())
    assert status == 0, shown
    assert "has not finished; its last checkpoint, checkpoint-2, is used" in shown


def test_a_run_without_a_checkpoint_has_no_model(tmp_path, capsys):
    (tmp_path / "run" / ".saving" / "checkpoint-1").mkdir(parents=True)
    assert "the folder has no config.json" in error_of(
        capsys, ["eval", "--model_name_or_path", str(tmp_path / "run"), *EVAL]
    )


def test_the_card_rounds_weights_and_names_its_members(interrupted):
    card = (interrupted / "README.md").read_text()
    assert "(weight 0.3)" in card
    assert "(weight 0.7)" in card
    assert "None" not in card


def test_the_card_of_a_single_model_names_the_folder_it_came_from(members, tmp_path):
    base, _ = members
    for verb, more in (("sft", []), ("train", ["--loss_type", "grpo"])):
        run = tmp_path / verb
        steps = [] if verb == "sft" else TINY
        flags = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", *more]
        small = ["--task", "arithmetic", "--train_limit", "8", "--use_cpu", "--bf16", "false", "--report_to", "none"]
        assert main([verb, "--model_name_or_path", base, "--output_dir", str(run), *(steps or small), *flags]) == 0
        card = (run / "README.md").read_text()
        assert "None" not in card
        assert f"fine-tuned version of `{base}`" in card
