"""The anchor is in host memory during updates, and nothing that is computed changes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import as_quantization
from logitmix.training.offload import AnchorOffload
from tests.helpers.grpo import mixture, trainer_of
from tests.helpers.members import INPUT, logits, tiny_member

ALIGNED = {"max_steps": 2}  # the batch of an outer step is one update's: nothing is scored before it
STALE = {"max_steps": 4, "num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 8}


@pytest.mark.parametrize("options", [ALIGNED, STALE, STALE | {"anchor_states": "offload"}], ids=str)
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_updates_never_run_the_anchor_and_train_the_same_weights(tmp_path, options, autocast):
    expected = trainer_of(tmp_path / "a", bf16=autocast, **options)
    expected.train()
    made = trainer_of(tmp_path / "b", bf16=autocast, offload_anchor=True, **options)
    loss, runs = made.loss, []

    def loss_of(*args):
        result = loss(*args)
        runs.append(made.offload.is_away)
        return result

    made.loss = loss_of
    made.train()
    assert runs
    assert all(runs), "an update has fetched the anchor"
    for name, weight in made.model.state_dict().items():
        torch.testing.assert_close(weight, expected.model.state_dict()[name], atol=1e-6, rtol=1e-4, msg=name)


def test_an_anchor_that_is_away_returns_when_it_runs():
    model = mixture()
    whole, anchor = logits(model), model.anchor_0
    offload = AnchorOffload(model.anchors)
    head = sum(p.nbytes for p in anchor.get_output_embeddings().parameters())
    assert offload.num_bytes == sum(p.nbytes for p in anchor.parameters()) - head
    for run in (
        lambda: logits(model),
        lambda: model.generate(**INPUT, max_new_tokens=2, decoding="alternating"),
        lambda: anchor.get_decoder()(**INPUT),
    ):
        offload.release()
        assert offload.is_away
        run()
        assert not offload.is_away
    assert torch.equal(logits(model), whole)


def test_what_cannot_be_offloaded_is_refused(tmp_path):
    policy = tiny_member("qwen2", 0)
    shared = LogitMixForCausalLM.from_members(policy, policy, peft_config=LoraConfig(r=2))
    for options, reason in (
        ({"anchor_states": "recompute"}, "the updates run the anchor"),
        ({"loss_head": "reference"}, "the updates run the anchor"),
        ({"model": shared}, "the anchor shares the policy's weights"),
        ({"model": tiny_member("qwen2", 0)}, "there is no anchor"),
    ):
        with pytest.raises(ValueError, match=f"offload_anchor is set, but .*{reason}"):
            trainer_of(tmp_path, offload_anchor=True, **options)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_weights_that_leave_take_no_memory(tmp_path, quantization):
    pytest.importorskip("torchao")
    for name, seed in (("policy", 0), ("anchor", 1)):
        tiny_member("qwen2", seed, hidden_size=1024, num_attention_heads=16).save_pretrained(tmp_path / name)
    given = {} if quantization is None else {"quantization_config": {"anchor_0": as_quantization(quantization)}}
    model = LogitMixForCausalLM.from_members(
        str(tmp_path / "policy"), str(tmp_path / "anchor"), dtype={"anchor_0": "bfloat16"}, **given
    )
    expected, offload = logits(model), AnchorOffload(model.anchors, str(tmp_path))
    for is_first in (True, False):  # by the first release small weights go back to a heap that malloc may keep
        before = resident()
        offload.release()
        assert is_first or before - resident() > 0.9 * offload.num_bytes
        assert torch.equal(logits(model), expected)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
