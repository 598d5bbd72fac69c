"""Responses are written row by row: what an interruption leaves, and how it is continued."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.requests import make_batches, make_requests
from logitmix.evaluation.responses import Responses, read_responses
from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks import Arithmetic
from tests.helpers.commands import TINY, error_of
from tests.helpers.members import character_tokenizer, tiny_member

TASK = Arithmetic()
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TASK.alphabet)


@pytest.fixture(scope="module")
def mixture(members) -> LogitMixForCausalLM:
    return LogitMixForCausalLM.from_members(*members).eval()


def count_passes(model) -> list[int]:
    """A list that gets an element at each pass of the model."""
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("stop", [(), ("a", "bc")], ids=["eos", "stop strings"])
def test_each_completion_is_reported_when_its_sequence_ends(stop):
    tokenizer, model = character_tokenizer(), tiny_member()
    passes = count_passes(model)
    reported: dict[int, list[int]] = {}
    at: list[int] = []

    def report(index, ids):
        assert index not in reported
        reported[index] = ids
        at.append(len(passes))
        assert len(ids) == len(passes)

    torch.manual_seed(0)
    completions = generate_completions(model, tokenizer, [[3, 4, 5]] * 12, SAMPLED, stop, on_completion=report)
    assert [reported[i] for i in range(12)] == completions
    assert len(set(at)) > 3, "sequences end at different steps"
    assert at == sorted(at)
    torch.manual_seed(0)
    assert generate_completions(model, tokenizer, [[3, 4, 5]] * 12, SAMPLED, stop) == completions


@pytest.fixture
def sampled(mixture, tokenizer):
    """A decoder of samples, which end at different steps, and one batch of 24 requests."""
    decode = make_decoder(mixture, tokenizer, TASK, TASK.problems("test", 4), 40, temperature=1.0)
    return decode, make_batches(make_requests({"policy": 0.0, "mixture": 0.5}, 4, num_samples=3), 24)


def test_the_file_grows_within_a_batch_and_is_always_a_beginning_of_the_whole(mixture, sampled, tmp_path):
    decode, batches = sampled
    path = tmp_path / "responses.jsonl"
    seen: list[bytes] = []
    hook = mixture.policy.register_forward_hook(lambda *_: seen.append(path.read_bytes() if path.exists() else b""))
    Responses(path).add("samples", batches, decode)
    hook.remove()
    whole = path.read_bytes()
    assert len(batches) == 1
    assert whole.count(b"\n") == 24
    assert len({len(text) for text in seen}) > 3, "rows are written while other sequences continue"
    assert all(whole.startswith(text) for text in seen)


@pytest.mark.parametrize("rows", [0, 1, 5, 23, 24])
@pytest.mark.parametrize("cut", ["", '{"name": "poli'])
def test_the_rows_of_an_interrupted_batch_are_kept(sampled, tmp_path, rows, cut):
    decode, batches = sampled
    path, whole = tmp_path / "responses.jsonl", tmp_path / "whole.jsonl"
    Responses(whole).add("samples", batches, decode)
    lines = whole.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:rows]) + cut)

    def interrupted(left):
        raise KeyboardInterrupt
        yield

    again = Responses(path)
    if rows < 24:
        with pytest.raises(KeyboardInterrupt):
            again.add("samples", batches, interrupted)
        assert path.read_text() == "".join(lines[:rows]), "a second interruption takes nothing away"
    resumed = Responses(path)
    resumed.add("samples", batches, decode)
    assert resumed.rows == read_responses(whole)
    if rows < 24:
        assert path.read_bytes() == whole.read_bytes()


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "logitmix.cli", *command], stderr=subprocess.DEVNULL)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "sweep"])
def test_a_killed_command_leaves_its_rows_and_continues_to_the_same_file(verb, members, tmp_path, capsys):
    command = [verb, "--model_name_or_path", members[0], "--anchor", members[1], "--eval_limit", "24"]
    command += ["--max_new_tokens", "64", "--batch_size", "4", *(["--alphas", "0.5"] if verb == "sweep" else [])]
    whole = tmp_path / "whole" / "responses.jsonl"
    path = tmp_path / "killed" / "responses.jsonl"
    process = start([*command, "--output_dir", str(path.parent)])
    wait_for_lines(path, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = path.read_bytes()
    assert all(json.loads(line) for line in left.split(b"\n")[:-1])
    assert f"{path} holds " in error_of(capsys, ["complement", str(path.parent)])
    assert main([*command, "--output_dir", str(whole.parent)]) == 0
    assert whole.read_bytes().startswith(left)
    assert main([*command, "--output_dir", str(path.parent)]) == 0
    assert path.read_bytes() == whole.read_bytes()
    assert main(["complement", str(path.parent)]) == 0


def test_a_part_of_the_responses_is_not_taken_for_the_whole(members, tmp_path, capsys):
    """The members that are complete can be compared."""
    folder = tmp_path / "eval"
    command = ["eval", "--model_name_or_path", members[0], "--anchor", members[1], "--eval_limit", "6"]
    command += ["--max_new_tokens", "8"]
    assert main([*command, "--output_dir", str(folder)]) == 0
    path = folder / "responses.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:14]))  # 6 of policy, 6 of anchor, 2 of the mixture
    message = error_of(capsys, ["complement", f"{folder}:policy", f"{folder}:mixture"])
    assert f"{path} holds 2 of 6 responses of 'mixture': its evaluation was interrupted; repeat its" in message
    assert main(["complement", f"{folder}:policy", f"{folder}:anchor"]) == 0
    path.write_text("".join(lines[:9]))
    assert "holds 3 of 6 responses of 'anchor'" in error_of(capsys, ["complement", str(folder)])


def test_an_evaluation_in_training_writes_its_responses(members, tmp_path):
    folder = tmp_path / "run"
    command = ["train", "--model_name_or_path", members[0], "--anchor", members[1], "--output_dir", str(folder)]
    assert main([*command, *TINY, "--max_steps", "2", "--eval_every", "1", "--eval_limit", "4"]) == 0
    rows = [json.loads(line) for line in (folder / "evaluation_responses.jsonl").read_text().splitlines()]
    wanted = {(step, name, i) for step in range(3) for name in ("policy", "anchor", "mixture") for i in range(4)}
    wanted -= {(step, "anchor", i) for step in (1, 2) for i in range(4)}  # frozen, and decoded once
    assert sorted((row["step"], row["name"], row["problem"]) for row in rows) == sorted(wanted)
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for line in evaluations:
        step = 0 if line["name"] == "anchor" else line["step"]
        graded = [row["format_ok"] for row in rows if (row["step"], row["name"]) == (step, line["name"])]
        assert line["format"] == sum(graded) / 4
