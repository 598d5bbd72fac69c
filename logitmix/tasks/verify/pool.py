"""A pool of worker processes for comparisons that may hang, crash or exhaust memory; each is killed after 2 seconds.

A worker is a fresh Python process (not a fork, which would copy the state of CUDA and of other threads) that imports
math-verify and not torch. Workers start when they are first needed, are replaced when they die, and end with this
process.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 2.0  # for one case
START_SECONDS = 120.0  # for a worker's imports, on a busy machine
TIMED_OUT = "timed out"
CRASHED = "the worker died"


class Pool:
    """Compares answers from any thread, as many at once as there are workers (None: one per core).

    errors, timeouts: the number of cases without a verdict, and how many of these were killed by the time limit
    """

    def __init__(self, size: int | None = None, seconds: float = SECONDS) -> None:
        self.size = size or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0, 0])
        if self.size < 1 or seconds <= 0:
            raise ValueError(f"a pool needs at least 1 worker and more than 0 seconds, not {self.size} and {seconds}")
        self.seconds = seconds
        self.errors = self.timeouts = 0
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(self.size)

    def compare(self, prediction: str, gold: str) -> tuple[bool, str | None]:
        """Whether math-verify finds them equal, and the error if it reached no verdict (they then count as unequal).

        Raises `RuntimeError` if no worker starts, since rewards of 0 would silently ruin a run.
        """
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                worker = _Worker()
            right, error = worker.ask(prediction, gold, self.seconds)
            with self._lock:
                self.errors += error is not None
                self.timeouts += error is not None and error.startswith(TIMED_OUT)
                if worker.alive():
                    self._idle.append(worker)
        return right, error

    def close(self) -> None:
        """End the idle workers; the pool may be used again."""
        with self._lock:
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.kill()


class _Worker:
    def __init__(self) -> None:
        package = str(Path(__file__).parents[3])
        paths = [package, *(str(Path(path).resolve()) for path in sys.path)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from logitmix.tasks.verify.symbolic import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is handled by the training, which then ends the workers
        )
        if self._read(START_SECONDS) != "ready":
            self.kill()
            raise RuntimeError(
                "a verifier's worker did not start; see its message above, and check `import math_verify`"
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # the request may still be in the buffer
                    pipe.close()

    def ask(self, prediction: str, gold: str, seconds: float) -> tuple[bool, str | None]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([prediction, gold]).encode() + b"\n")
            self.process.stdin.flush()
            reply = self._read(seconds)
        except BrokenPipeError:
            reply = ""
        if reply:
            right, error = json.loads(reply)
            return right, error
        self.kill()
        return False, f"{TIMED_OUT} after {seconds:g} s" if reply is None else CRASHED

    def _read(self, seconds: float) -> str | None:
        """A line; empty if the worker died, None if the time ran out."""
        assert self.process.stdout is not None
        channel, line, end = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(channel, select.POLLIN | select.POLLHUP)
        while not line.endswith(b"\n"):
            if not waiting.poll(max(0, 1000 * (end - time.monotonic()))):
                return None
            piece = os.read(channel, 65536)
            if not piece:
                return ""
            line += piece
        return line.decode().strip()


_pool: Pool | None = None
_pool_lock = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process."""
    global _pool
    with _pool_lock:
        _pool = _pool or Pool()
        return _pool


def _forget() -> None:
    """Drop the pool in a forked child, which must not use its parent's workers or wait for its locks."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@atexit.register
def _close() -> None:
    if _pool is not None:
        _pool.close()
