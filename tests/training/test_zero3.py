"""DeepSpeed's ZeRO-3, which partitions members as they load and gathers a head only in its own forward."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.torchrun import run_two_processes
from tests.helpers.two_processes import save_members

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; docs/scaling.md says how it was")
pytestmark = pytest.mark.slow

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
# The members were saved before: under ZeRO-3 one process cannot make a model by itself
SCRIPT = """
import sys
from pathlib import Path

import torch
import two_processes

folder = Path(sys.argv[1])
two_processes.save_members = lambda folder: None
settings = two_processes.BATCHES["two updates"] | {settings}
trainer = two_processes.trainer_of(folder, from_folders=True, **settings)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    torch.save(trainer.rollouts, folder / "rollouts.pt")
"""


@pytest.mark.parametrize("option", [{}, {"delta": 2.0}], ids=["in the forward pass", "computed again"])
def test_partitioned_members_are_trained_as_under_ddp(tmp_path, option):
    saved, rollouts = [], []
    for name, zero3 in (("ddp", {}), ("zero3", {"deepspeed": ZERO3})):
        save_members(tmp_path / name / "run")
        run_two_processes(SCRIPT.replace("{settings}", repr(option | zero3)), tmp_path / name)
        saved.append(load_file(tmp_path / name / "run" / "model.safetensors"))
        rollouts.append(torch.load(tmp_path / name / "run" / "rollouts.pt"))
    assert rollouts[0] == rollouts[1]
    torch.testing.assert_close(saved[1], saved[0], atol=1e-6, rtol=1e-5)
