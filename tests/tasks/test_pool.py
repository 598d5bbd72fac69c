"""The pool: time limits, replaced workers, counts, threads, forks, and no orphaned processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitmix.tasks.verify import pool as pool_module
from logitmix.tasks.verify.pool import CRASHED, TIMED_OUT, Pool, shared_pool


@pytest.fixture
def pool():
    pool = Pool(size=1)
    yield pool
    pool.close()


def test_a_case_that_hangs_is_killed_and_counted_and_the_next_one_works(pool):
    assert pool.compare("x+1", "1+x") == (True, None)
    start = time.perf_counter()
    assert pool.compare("(x+y)^{2000}", "(x+y)^{1999}") == (False, f"{TIMED_OUT} after 2 s")
    assert time.perf_counter() - start < 30
    assert (pool.errors, pool.timeouts) == (1, 1)
    assert pool.compare("x+1", "1+x") == (True, None)


def test_a_stopped_worker_is_killed_at_the_time_limit(pool):
    assert pool.compare("x+1", "1+x")[0]
    worker = pool._idle[0]
    os.kill(worker.process.pid, 19)  # SIGSTOP: the worker no longer replies
    start = time.perf_counter()
    assert pool.compare("x+1", "1+x") == (False, f"{TIMED_OUT} after 2 s")
    assert 1.9 < time.perf_counter() - start < 30
    assert worker.process.poll() is not None
    assert (pool.errors, pool.timeouts) == (1, 1)
    assert pool.compare("x+1", "1+x") == (True, None)


def test_a_worker_that_dies_is_replaced(pool):
    assert pool.compare("x+1", "1+x")[0]
    pool._idle[0].process.kill()
    pool._idle[0].process.wait()
    assert pool.compare("x+1", "1+x") == (False, CRASHED)
    assert (pool.errors, pool.timeouts) == (1, 0)
    assert pool.compare("x+1", "1+x") == (True, None)


@pytest.mark.parametrize("hostile", ["\x00", "\ud800", "\n[1]\n", '"]', "7" * 400, "(" * 400, "\\frac{" * 80])
def test_hostile_text_does_not_break_the_protocol(pool, hostile):
    assert not pool.compare(hostile, "x+1")[0]
    assert pool.compare("x+1", "1+x") == (True, None)


def test_threads_share_a_pool():
    pool = Pool(size=2)
    cases = [(f"x+{n}", f"{n % 7}+x") for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda case: pool.compare(*case), cases))
    assert found == [(n == n % 7, None) for n in range(40)]
    assert len(pool._idle) <= 2
    pool.close()


def test_a_process_has_one_pool_that_starts_workers_on_demand():
    assert shared_pool() is shared_pool()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(shared_pool()))
    thread.start()
    thread.join()
    assert seen == [shared_pool()]
    assert Pool(size=1)._idle == []


def test_a_pool_without_workers_or_time_is_rejected():
    with pytest.raises(ValueError, match="at least 1 worker and more than 0 seconds, not 1 and 0"):
        Pool(size=1, seconds=0)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def test_workers_end_with_the_process_and_do_not_import_torch():
    done = run(
        "from pathlib import Path\n"
        "from logitmix.tasks.verify.pool import shared_pool\n"
        "pool = shared_pool(); print(pool.compare('x+1', '1+x'))\n"
        "pid = pool._idle[0].process.pid; print(pid)\n"
        "print('torch' in Path(f'/proc/{pid}/maps').read_text())\n"
    )
    verdict, pid, torch = done.stdout.split("\n")[:3]
    assert verdict == "(True, None)", done.stderr
    assert torch == "False"
    assert not os.path.exists(f"/proc/{pid}")


def test_workers_end_when_their_parent_is_killed():
    done = run(
        "import os\n"
        "from logitmix.tasks.verify.pool import shared_pool\n"
        "pool = shared_pool(); pool.compare('x+1', '1+x')\n"
        "print(pool._idle[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    pid = done.stdout.strip()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, f"worker {pid} still runs"
        time.sleep(0.1)


def test_a_worker_does_not_run_the_main_script_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('ran')\nfrom logitmix.tasks.verify.pool import shared_pool\nprint(shared_pool().compare('x', 'x+1'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert done.stdout.split("\n")[:2] == ["ran", "(False, None)"], done.stderr


def test_a_child_forked_while_the_lock_is_held_gets_a_new_pool():
    parent = pool_module.shared_pool()
    with pool_module._pool_lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if pool_module.shared_pool() is not parent else 1)
        for _ in range(200):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
    assert status == 0
