"""FSDP2 in two processes whose batches differ: a pass that only one of them takes is one for which it waits."""

import pytest

from tests.helpers.torchrun import run_two_processes

pytestmark = pytest.mark.slow

# Every process compares with its own whole copy of the model. A wait for a pass that the other leaves out is an error
# after the timeout.
SCRIPT = """
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import PAD, tiny_member

rank = PartialState(cpu=True, timeout=timedelta(seconds=60)).process_index
short, long = list(range(3, 7)), list(range(7, 47))


def one_model():
    member = tiny_member("qwen2", 0)
    return LogitMixForCausalLM.from_members(member, member, weights=[1.5, -0.5]).eval()


def three_models():
    members = [tiny_member(name, i) for i, name in enumerate(("qwen2", "llama", "qwen2-sliding"))]
    return LogitMixForCausalLM.from_members(members[0], members[1:], weights=[1.0, 0.5, -0.5]).eval()


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for name in model.config.model_names:
        for layer in getattr(model, name).get_decoder().layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def passes_and_tokens(model, prompt, **arguments):
    passes = []
    for name in model.config.model_names:
        decoder = getattr(model, name).get_decoder()
        decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    prompts = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD}
    return passes, model.generate(**prompts, **arguments)


for build, prompt, arguments in (
    (one_model, short, {"member_prompts": {"anchor": (short, long)[rank]}}),  # read in one pass where both are short
    (one_model, (long, short)[rank], {"member_prompts": {"anchor": short}}),
    (three_models, (short, long)[rank], {"weights": torch.tensor([[1.0, 0.5, 0.5 * rank]])}),  # one member is off
):
    _, expected = passes_and_tokens(build(), prompt, **arguments)
    passes, tokens = passes_and_tokens(shard(build()), prompt, **arguments)
    assert torch.equal(tokens, expected)
    first, second = gather_object([len(passes)])
    assert first == second
"""


def test_processes_with_prompts_of_other_lengths_take_equally_many_passes(tmp_path):
    run_two_processes(SCRIPT, tmp_path)
