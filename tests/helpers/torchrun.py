"""Runs a script in two processes on the CPU, as torchrun starts them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# gloo's threads may abort a process that exits while they run, also after its group is destroyed
_LAST_LINES = """
import os, sys
from accelerate import PartialState

PartialState().wait_for_everyone()
PartialState().destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run_two_processes(script: str, folder: Path) -> str:
    """The output of the script in both processes; `folder/run` is its argument."""
    path = folder / "two.py"
    path.write_text(textwrap.dedent(script) + _LAST_LINES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(path), str(folder / "run")], capture_output=True, text=True, timeout=960,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
