"""A run that is killed at any moment and resumed matches an uninterrupted one bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_and_resume
import pytest
import torch
from datasets import Dataset
from kill_and_resume import FLAGS, Run, differences
from trl.trainer.utils import RepeatSampler

from logitmix.runs.files import read_jsonl
from logitmix.training.checkpointing.folders import FILE_LIST, STAGING, fault, last_whole_checkpoint
from logitmix.training.checkpointing.resume import EpochRepeatSampler

RESUME = ("--resume_from_checkpoint", "true")


class Killable:
    """A run's folder, its command, and the output of the command."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder, self.flags = folder, [*flags, "--output_dir", str(folder)]
        self.log = folder.with_suffix(".log")
        self.log.touch()

    def start(self, *flags: str, **kwargs) -> Run:
        return Run([*self.flags, *flags], self.log, **kwargs)

    def finish(self, *flags: str, **kwargs) -> None:
        assert self.start(*flags, **kwargs).wait() == 0, self.log.read_text()

    def die(self, *flags: str, **kwargs) -> None:
        assert self.start(*flags, **kwargs).wait() == -signal.SIGKILL, self.log.read_text()

    def fail(self, *flags: str, **kwargs) -> str:
        """The error that the command prints last."""
        assert self.start(*flags, **kwargs).wait() == 2, self.log.read_text()
        return self.log.read_text().splitlines()[-1]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    @property
    def starts(self) -> list[dict]:
        return read_jsonl(self.folder / "run.jsonl")


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> list[str]:
    """The command of a tiny training, without its output folder."""
    return ["train", *kill_and_resume.make_members(tmp_path_factory.mktemp("members")), *FLAGS]


@pytest.fixture(scope="module")
def never_killed(train, tmp_path_factory) -> Path:
    run = Killable(tmp_path_factory.mktemp("runs") / "never_killed", train)
    run.finish()
    return run.folder


@pytest.fixture
def run(train, tmp_path) -> Killable:
    return Killable(tmp_path / "run", train)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_equals_the_run_never_killed(run, never_killed):
    chance = random.Random(0)
    for flags, phase, last in (((), "update", 6), (RESUME, "checkpoint", 2), (RESUME, "update", 3)):
        process = run.start(*flags)
        process.until(f"{phase} {chance.randint(1, last)}")
        time.sleep(chance.uniform(0, 0.02))
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, run.log.read_text()
    run.finish(*RESUME)
    assert not differences(run.folder, never_killed)


@pytest.mark.slow
def test_fresh_validation_questions_are_the_next_ones_after_a_resume(train, tmp_path):
    flags = [*train, "--validation_source", "train", "--train_limit", "16", "--logging_steps", "1"]
    flags += ["--dynamic_sampling", "off"]
    whole, killed = Killable(tmp_path / "whole", flags), Killable(tmp_path / "killed", flags)
    whole.finish()
    killed.die(die_at=("open", f"{STAGING}/checkpoint-6/config.json"))
    killed.finish(*RESUME)
    assert not differences(killed.folder, whole.folder)
    alphas = {row["alpha"] for row in read_jsonl(whole.folder / "metrics.jsonl") if "alpha" in row}
    assert len(alphas) > 1, "alpha moves, so that losing it would be seen"


@pytest.mark.slow
def test_a_checkpoint_that_was_being_written_is_never_taken(run, never_killed):
    run.die(die_at=("open", f"{STAGING}/checkpoint-2/trainer_state.json"))
    assert (run.folder / STAGING / "checkpoint-2" / "model.safetensors").exists()
    assert run.checkpoints == ["checkpoint-1"], "save_total_limit is 1: it is not deleted before the next is whole"
    run.die(*RESUME, die_at=("os.rename", f"{STAGING}/checkpoint-5"))
    assert run.checkpoints == ["checkpoint-4"]
    run.finish(*RESUME)
    assert not differences(run.folder, never_killed)
    assert not (run.folder / STAGING).exists()
    assert [start["passed_over"] for start in run.starts] == [
        [],
        ["checkpoint-2 was only partly written when the run stopped, and is removed"],
        ["checkpoint-5 was only partly written when the run stopped, and is removed"],
    ]
    printed = " ".join(run.log.read_text().split())
    expected = "checkpoint-5 was only partly written when the run stopped, and is removed; the run continues from"
    assert expected in printed


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_or_after_its_last_step(run, never_killed):
    run.die(die_at=("open", f"{STAGING}/checkpoint-1/config.json"))
    assert run.checkpoints == []
    run.die(*RESUME, die_at=("open", "run/config.json"))  # the model at the end
    assert run.checkpoints == ["checkpoint-8"]
    run.finish(*RESUME)
    assert not differences(run.folder, never_killed)
    assert "and starts again" in run.log.read_text()


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_stops(run, never_killed):
    process = run.start()
    process.until_begun()
    process.signal(signal.SIGTERM)
    assert process.wait() == 130
    assert run.checkpoints
    assert "SIGTERM: finishing this step" in run.log.read_text()
    run.finish(*RESUME)
    assert not differences(run.folder, never_killed)


@pytest.mark.slow
def test_what_trl_leaves_out_of_a_checkpoint_is_missed(run, never_killed):
    """The comparison can fail: without our progress file, the rollouts in use are lost."""
    run.die(die_at=("open", f"{STAGING}/checkpoint-4/config.json"))
    (checkpoint,) = run.folder.glob("checkpoint-3")
    (checkpoint / "progress_0.pt").unlink()
    (checkpoint / FILE_LIST).unlink()
    run.finish(*RESUME)
    assert "model.safetensors" in differences(run.folder, never_killed)


@pytest.mark.slow
def test_no_room_for_a_checkpoint_stops_the_run_and_leaves_the_last_one_whole(run, never_killed):
    run.die(die_at=("open", f"{STAGING}/checkpoint-4/config.json"))
    message = run.fail(*RESUME, file_size=500_000)
    assert f"checkpoint-4 could not be written to {run.folder}: it takes about 3.3" in message
    assert f"{run.folder}/checkpoint-3 is whole, so the run can resume from it" in message
    assert fault(run.folder / "checkpoint-3") is None
    assert not (run.folder / STAGING).exists()
    run.finish(*RESUME)
    assert not differences(run.folder, never_killed)


@pytest.mark.slow
def test_a_full_disk(train, tmp_path):
    """A file system of 7 MB, which holds one checkpoint and not two."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    command = [sys.executable, "-m", "logitmix.cli", *train, "--output_dir", str(disk / "run")]
    script = f'mount -t tmpfs -o size=7M none {disk} || exit 77; "$@"; cp -r {disk} {out}; df {disk} > {out}/df'
    path = os.pathsep.join([str(Path(kill_and_resume.__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=960,
    )  # fmt: skip
    if not out.exists():
        pytest.skip(f"no file system of one's own here: {result.stderr}")
    message = result.stderr.splitlines()[-1]
    assert "checkpoint-2 could not be written" in message
    assert "checkpoint-1 is whole" in message
    assert fault(out / "run" / "checkpoint-1") is None
    assert not (out / "run" / STAGING).exists(), "it would keep the disk full"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run, never_killed):
    flags = ("--save_total_limit", "3")
    run.die(*flags, die_at=("open", f"{STAGING}/checkpoint-5/config.json"))
    damaged = run.folder / "checkpoint-4"
    os.truncate(damaged / "optimizer.pt", 1000)
    message = run.fail(*flags, "--resume_from_checkpoint", str(damaged))
    assert "checkpoint-4 is incomplete: its optimizer.pt has 1000 of" in message
    assert f"the last complete one is {run.folder}/checkpoint-3" in message
    run.finish(*flags, *RESUME)
    assert run.starts[-1]["resumed_from"] == str(run.folder / "checkpoint-3")
    half_written, aside = run.starts[-1]["passed_over"]
    assert half_written.startswith("checkpoint-5 was only partly written")
    assert aside.startswith("checkpoint-4 is incomplete: its optimizer.pt has 1000 of")
    assert not differences(run.folder, never_killed)


@pytest.mark.slow
def test_a_resumed_sft_equals_the_one_never_killed(train, tmp_path):
    model = train[train.index("--model_name_or_path") + 1]
    flags = ["sft", "--model_name_or_path", model, "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    flags += ["--train_limit", "12", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    flags += ["--num_train_epochs", "3", "--logging_steps", "2", "--save_steps", "1", "--learning_rate", "1e-3"]
    whole, killed = Killable(tmp_path / "whole", flags), Killable(tmp_path / "killed", flags)
    whole.finish()
    killed.die(die_at=("open", f"{STAGING}/checkpoint-6/config.json"))  # step 5 is in the second epoch
    killed.die(*RESUME, die_at=("open", "killed/config.json"))
    killed.finish(*RESUME)
    assert not differences(killed.folder, whole.folder, compared=("model.safetensors", "config.json"))


@pytest.mark.slow
def test_two_processes_resume_as_one_run(train, tmp_path):
    """From a checkpoint between the updates of an outer step, in a folder that has moved."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    flags = [*train, "--per_device_train_batch_size", "4", "--save_total_limit", "8"]
    path = os.pathsep.join([str(Path(kill_and_resume.__file__).parent), os.environ.get("PYTHONPATH", "")])

    def finish(folder: Path, *more: str) -> None:
        command = [*launch, "logitmix.cli", *flags, "--output_dir", str(folder), *more]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=960)
        assert result.returncode == 0, result.stderr[-3000:]

    finish(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    finish(tmp_path / "again", "--resume_from_checkpoint", str(tmp_path / "again" / "checkpoint-5"))
    assert not differences(tmp_path / "again", tmp_path / "whole")


def test_an_epochs_order_depends_on_its_number_alone():
    rows = Dataset.from_dict({"x": range(10)})
    arguments = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}
    trls = RepeatSampler(rows, **arguments)
    epochs = [list(trls) for _ in range(3)]
    ours = EpochRepeatSampler(rows, **arguments)
    for epoch in (2, 0, 1):
        ours.set_epoch(epoch)
        assert list(ours) == epochs[epoch]
    assert epochs[0] != epochs[1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 10}')
    torch.save({"a": torch.zeros(100)}, folder / "optimizer.pt")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / FILE_LIST).write_text(json.dumps(sizes))
    return folder


def test_faults_of_a_checkpoint(checkpoint):
    assert fault(checkpoint) is None
    os.truncate(checkpoint / "optimizer.pt", 99)
    assert fault(checkpoint).startswith("its optimizer.pt has 99 of ")
    (checkpoint / "optimizer.pt").unlink()
    assert fault(checkpoint) == "its optimizer.pt is missing"
    (checkpoint / FILE_LIST).write_text("{")
    assert fault(checkpoint) == "its trainer_state.json or checkpoint_files.json is damaged"
    (checkpoint / "trainer_state.json").unlink()
    assert fault(checkpoint) == "it has no trainer_state.json"


def test_the_last_whole_checkpoint_is_the_one_of_most_steps(checkpoint):
    run_folder = checkpoint.parent
    for step in (9, 100):
        shutil.copytree(checkpoint, run_folder / f"checkpoint-{step}")
    assert last_whole_checkpoint(run_folder).name == "checkpoint-100"
    (run_folder / "checkpoint-100" / "optimizer.pt").unlink()
    assert last_whole_checkpoint(run_folder).name == "checkpoint-10"
    (run_folder / "checkpoint-9x").mkdir()
    (run_folder / STAGING / "checkpoint-200").mkdir(parents=True)
    assert last_whole_checkpoint(run_folder).name == "checkpoint-10"
    assert last_whole_checkpoint(run_folder / "no such folder") is None
