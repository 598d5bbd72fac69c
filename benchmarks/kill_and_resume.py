"""Kill a training run at random moments, resume it, and compare the result with that of an uninterrupted run.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--output benchmarks/results/kill_and_resume.md]

Each trial starts the same run of `logitmix train` (a tiny mixture on a CPU in float32), kills its process with
SIGKILL, resumes it with `--resume_from_checkpoint true`, and compares the two runs' files: weights, configuration
(alpha), completions and evaluations byte by byte, and every metric except times.

Half of the kills are at a time drawn uniformly between the first evaluation and the end. The others cycle through
rollouts, updates, checkpoints, validations and evaluations, each within 20 ms after a random one of them begins.

A server process imports everything once and forks a process for each run, so a start costs no imports.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from logitmix.tasks import Arithmetic, Grade

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["logitmix.cli.train", "logitmix.paper.quickstart"])

# Two epochs. Each batch of rollouts serves four micro-batches twice, so four updates, with checkpoints between them
# and logs between checkpoints. One checkpoint is kept.
FLAGS = shlex.split("""
    --task kill_and_resume.EasyArithmetic --use_cpu true --bf16 false --gradient_checkpointing false --report_to none
    --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 16
    --steps_per_generation 4 --gradient_accumulation_steps 2 --num_iterations 2
    --train_limit 8 --max_steps 8 --learning_rate 1e-3 --logging_steps 3
    --save_steps 1 --save_total_limit 1 --eval_every 2 --eval_limit 2
    --alpha 0.4 --alpha_controller adaptive --validation_size 8 --adaptive_offset 1 --adaptive_scale 4
    --dynamic_sampling refill
""")
# Number of times that each phase occurs in the run
PHASES = {"rollouts": 2, "update": 16, "checkpoint": 8, "validation": 2, "evaluation": 5}
COMPARED = ("model.safetensors", "config.json", "completions.jsonl", "evaluations.jsonl")
TIMES = re.compile(r"step_time|train_runtime|.*_per_second(/.*)?|time/.*")


class EasyArithmetic(Arithmetic):
    """Rewards responses that untrained members produce by chance, so that every step has a gradient."""

    def grade(self, response: Any, problem: Any) -> Grade:
        right = sum(character.isdigit() for character in response) >= 4
        return Grade(format_ok=True, answer_ok=right, lenient_ok=right, answer=response, error=None)


def make_members(folder: Path) -> list[str]:
    """Save a policy and an anchor with seeded weights; return them as flags of `logitmix train`."""
    from logitmix.paper.tiny_model import character_tokenizer, tiny_model

    tokenizer = character_tokenizer(Arithmetic.alphabet)
    for seed, name in enumerate(("policy", "anchor")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--model_name_or_path", str(folder / "policy"), "--anchor", str(folder / "anchor")]


class Run:
    """A command in its own process, which reports its phase in shared memory.

    Args:
        die_at: an audit event of Python ("open", "os.rename", …) and a path suffix: the process kills itself before
            that event on such a path.
        file_size: the largest file in bytes that the process can write, to simulate a full disk.
    """

    def __init__(
        self, argv: Sequence[str], log: Path, die_at: tuple[str, str] | None = None, file_size: int | None = None
    ) -> None:
        self._phase = FORKS.RawArray("c", 64)
        self.log = log
        arguments = (list(argv), str(log), self._phase, die_at, file_size)
        self.process = FORKS.Process(target=_command, args=arguments)
        self.process.start()

    @property
    def phase(self) -> str:
        return self._phase.value.decode()

    def until(self, phase: str) -> None:
        """Wait until a phase begins or the process ends."""
        while self.phase != phase and self.process.is_alive():
            time.sleep(0.0005)

    def until_begun(self) -> None:
        """Wait until the first phase begins. Raises `RuntimeError` with the log if the process ends before."""
        while not self.phase:
            if not self.process.is_alive():
                raise RuntimeError(self.log.read_text())
            time.sleep(0.0005)

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def _command(argv: list[str], log: str, phase: Any, die_at: tuple[str, str] | None, file_size: int | None) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    torch.set_num_threads(1)
    from transformers import Trainer
    from trl import GRPOTrainer

    from logitmix.cli.__main__ import main
    from logitmix.evaluation import during_training
    from logitmix.training.alpha import callback as alpha_control

    for owner, method, name in (
        (GRPOTrainer, "_generate_and_score_completions", "rollouts"),
        (Trainer, "training_step", "update"),
        (Trainer, "_save_checkpoint", "checkpoint"),
        (alpha_control, "validate", "validation"),
        (during_training, "greedy_responses", "evaluation"),
    ):
        setattr(owner, method, _noting(getattr(owner, method), name, phase))
    if die_at is not None:
        sys.addaudithook(lambda event, args: _die_at(die_at, event, args))
    sys.exit(main(argv))


def _noting(function: Callable[..., Any], name: str, phase: Any) -> Callable[..., Any]:
    """Wrap a function to set `phase` to `name` and the number of the call while it runs."""
    calls = itertools.count(1)

    def noting(*args: Any, **kwargs: Any) -> Any:
        before, phase.value = phase.value, f"{name} {next(calls)}".encode()
        try:
            return function(*args, **kwargs)
        finally:
            phase.value = before

    return noting


def _die_at(die_at: tuple[str, str], event: str, args: tuple[Any, ...]) -> None:
    if event == die_at[0] and str(args[0]).endswith(die_at[1]):
        os.kill(os.getpid(), signal.SIGKILL)


def differences(folder: Path, reference: Path, compared: Sequence[str] = COMPARED) -> list[str]:
    """The files in which two runs differ, and the metrics by step."""
    found = [name for name in compared if (folder / name).read_bytes() != (reference / name).read_bytes()]
    rows, expected = (metrics(path / "metrics.jsonl") for path in (folder, reference))
    if len(rows) != len(expected):
        found.append(f"metrics.jsonl has {len(rows)} lines, not {len(expected)}")
    for row, other in zip(rows, expected, strict=False):
        keys = [key for key in row.keys() | other.keys() if row.get(key) != other.get(key)]
        found += [f"metrics.jsonl: {key} at step {row['step']}" for key in sorted(keys)]
    return found


def metrics(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not TIMES.fullmatch(key)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        lines = list(trials(Path(name), args.kills, chance))
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


def killed(number: int, command: list[str], out: Path, log: Path, seconds: float, chance: random.Random) -> Run:
    """A run that was killed while it ran: at any time of its `seconds` if the number is odd, else in some phase."""
    status = 0
    while status == 0:  # a time near the end may be drawn after the process has ended
        shutil.rmtree(out, ignore_errors=True)
        run = Run(command, log)
        run.until_begun()
        if number % 2:
            time.sleep(chance.uniform(0, seconds))
        else:
            name = list(PHASES)[number // 2 % len(PHASES)]
            run.until(f"{name} {chance.randint(1, PHASES[name])}")
            time.sleep(chance.uniform(0, 0.02))
        run.signal(signal.SIGKILL)
        status = run.wait()
    assert status == -signal.SIGKILL, log.read_text()
    return run


def trials(folder: Path, kills: int, chance: random.Random) -> Iterator[str]:
    """The lines of the report."""
    command = ["train", *make_members(folder), *FLAGS, "--output_dir"]
    reference, log = folder / "reference", folder / "log.txt"
    run = Run([*command, str(reference)], log)
    before_first = time.monotonic()
    run.until_begun()
    first = time.monotonic()
    if run.wait():
        raise SystemExit(log.read_text())
    last = time.monotonic()
    yield "# Kill and resume"
    yield ""
    yield f"{date.today()}, printed by `python benchmarks/kill_and_resume.py --kills {kills}`. A run: 8 steps in"
    yield f"{last - first:.1f} s from its first evaluation on, {first - before_first:.1f} s before. An update is a"
    yield "micro-batch; phases are counted in the killed process."
    yield ""
    yield "| kill | during | resumed from | differs in |"
    yield "|---|---|---|---|"
    same = 0
    for number in range(1, kills + 1):
        out = folder / f"run-{number}"
        run = killed(number, [*command, str(out)], out, log, last - first, chance)
        assert Run([*command, str(out), "--resume_from_checkpoint", "true"], log).wait() == 0, out
        starts = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
        found = differences(out, reference)
        same += not found
        source = Path(starts[-1]["resumed_from"] or "step 0").name
        yield f"| {number} | {run.phase or 'between phases'} | {source} | {', '.join(found) or 'nothing'} |"
    yield ""
    yield f"**{same} of {kills} resumed runs match the uninterrupted run bit for bit.**"


if __name__ == "__main__":
    main()
