"""Mixtures whose weights are split over processes: the passes of a process do not depend on its own batch."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.sharding import are_sharded
from tests.helpers.members import INPUT, PAD, tiny_member


def shard(module):
    """The module as FSDP2 types it; its weights stay whole."""
    module.__class__ = type("Sharded", (FSDPModule, type(module)), {"__new__": lambda cls: object.__new__(cls)})
    return module


def one_model():
    member = tiny_member("qwen2", 0)
    return LogitMixForCausalLM.from_members(member, member, weights=[1.5, -0.5], scheme="logit").eval()


@pytest.mark.parametrize("prompt", [[7, 21], [3 + i for i in range(40)]])
def test_members_of_one_model_have_a_pass_each_however_long_their_prompts(prompt):
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "member_prompts": {"anchor": prompt}}
    expected = one_model().generate(**INPUT, **arguments)
    model, passes = one_model(), []
    model.generate(**INPUT, **arguments)  # the first call tries the output head out
    model.policy.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    shard(model.policy)
    assert torch.equal(model.generate(**INPUT, **arguments), expected)
    assert len(passes) == 2 * 4


def test_all_members_run_at_weights_of_each_sequence():
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("llama", 1)).eval()
    passes = []
    model.anchor_0.register_forward_pre_hook(lambda *_: passes.append(1))
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    with torch.no_grad():
        expected = model(**INPUT, weights=weights).logits
        assert len(passes) == 0
        shard(model)
        assert torch.equal(model(**INPUT, weights=weights).logits, expected)
        assert len(passes) == 1
        model(**INPUT, weights=[1.0, 0.0])
        assert len(passes) == 1, "weights of the batch are the same in all processes"


def test_members_that_are_sharded_do_not_alternate():
    """Each process would take passes for its own accepted drafts."""
    model = LogitMixForCausalLM.from_members(tiny_member("qwen2", 0), tiny_member("llama", 1)).eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**INPUT, **arguments)
    shard(model.anchor_0)
    with pytest.raises(ValueError, match="alternating decoding cannot be used with weights that are sharded"):
        model.generate(**INPUT, **arguments, decoding="alternating")
    assert torch.equal(model.generate(**INPUT, **arguments, decoding="auto"), expected)


def test_sharded_weights_are_those_of_fsdp2_and_of_zero_3():
    plain, zero3 = nn.Linear(2, 2), nn.Linear(2, 2)
    zero3.weight.ds_id = 0
    assert not are_sharded([plain, nn.Identity()])
    assert are_sharded([plain, zero3])
    assert are_sharded([shard(nn.Linear(2, 2)), plain])
