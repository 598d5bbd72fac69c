"""Re-anchoring: the anchor takes the policy's or the merged weights between outer steps, and a resume has them."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from logitmix.cli.__main__ import main
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.runs.files import read_jsonl
from tests.helpers.commands import TINY, save_member
from tests.helpers.grpo import assert_same_weights, mixture, trainer_of
from tests.helpers.two_processes import mixture as two_process_mixture


class Recorder(TrainerCallback):
    """Copies of both members after each update, before the anchor is replaced."""

    def __init__(self):
        self.members = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.members.append([copy.deepcopy(m.state_dict()) for m in (model.policy, model.anchors[0])])


def trained(folder, **kwargs):
    trainer = trainer_of(folder, mixture(anchor="qwen2"), max_steps=3, **kwargs)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder.members


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_policy_becomes_the_anchor_at_its_steps_only(tmp_path):
    trainer, members = trained(tmp_path, reanchor_steps=2)
    first, second, third = members
    assert same(first[1], second[1])
    assert same(third[1], second[0]), "the policy after update 2"
    assert not same(third[1], second[1])
    assert not same(trainer.model.policy.state_dict(), trainer.model.anchors[0].state_dict())
    assert not any(p.requires_grad for p in trainer.model.anchors[0].parameters())


def test_merged_weights_are_the_average_at_alpha(tmp_path):
    trainer, members = trained(tmp_path, reanchor_steps=3, reanchor_to="merged")
    policy, anchor = members[-1]
    for name, weight in trainer.model.anchors[0].named_parameters():
        torch.testing.assert_close(weight, 0.6 * policy[name] + 0.4 * anchor[name])


def test_a_resumed_run_has_the_anchor_of_its_checkpoint(tmp_path):
    whole, _ = trained(tmp_path, reanchor_steps=2, save_strategy="steps", save_steps=1)
    saved = [LogitMixForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert not same(saved[0].anchors[0].state_dict(), saved[1].anchors[0].state_dict())
    assert same(saved[1].policy.state_dict(), saved[1].anchors[0].state_dict())
    for step in (1, 2):
        again = trainer_of(tmp_path, mixture(anchor="qwen2"), max_steps=3, reanchor_steps=2)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model.state_dict(), whole.model.state_dict())
    whole.save_model()
    assert_same_weights(LogitMixForCausalLM.from_pretrained(tmp_path), whole.model)


def test_an_evaluation_decodes_the_present_anchor(tmp_path):
    members = [save_member(tmp_path / name, seed) for seed, name in enumerate(("policy", "anchor"))]
    flags = ["--model_name_or_path", members[0], "--anchor", members[1], "--task", "arithmetic", *TINY]
    flags += ["--max_steps", "1", "--eval_every", "1", "--eval_limit", "4", "--reanchor_steps", "1"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 0
    rows = read_jsonl(tmp_path / "run" / "evaluation_responses.jsonl")
    texts = {(row["step"], row["name"], row["problem"]): row["response"] for row in rows}
    assert [texts[1, "anchor", i] for i in range(4)] == [texts[1, "policy", i] for i in range(4)]
    assert [texts[0, "anchor", i] for i in range(4)] != [texts[1, "anchor", i] for i in range(4)]


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ("qwen2", {"reanchor_steps": 0}, "reanchor_steps is 0, and an outer step has 1 updates"),
        ("qwen2", {"reanchor_steps": 3, "num_iterations": 2}, "an outer step has 2 updates; .* a multiple of 2"),
        ("llama", {"reanchor_steps": 1}, "the weights of policy and anchor cannot be merged: .*; leave out"),
        ("adapters", {"reanchor_steps": 1}, "the anchor shares the policy's model"),
        ("qwen2", {"reanchor_steps": 1, "save_frozen": "never"}, "save_frozen is 'never'"),
        ("qwen2", {"reanchor_steps": 1, "offload_anchor": True}, "offload_anchor keeps a copy"),
        ("qwen2", {"reanchor_to": "merged"}, "nothing would read it: it goes with reanchor_steps"),
        ("qwen2", {"reanchor_steps": 1, "reanchor_to": "anchor"}, "reanchor_to"),
    ],
)
def test_what_cannot_be_replaced_is_refused(tmp_path, members, options, message):
    model = two_process_mixture(adapters=True) if members == "adapters" else mixture(anchor=members)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model, **options)
