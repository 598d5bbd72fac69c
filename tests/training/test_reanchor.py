"""Re-anchoring: the anchor takes the policy's or the merged weights between outer steps, and a resume has them."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from logitmix.cli.__main__ import main
from logitmix.mixture.frozen.references import STORE
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.runs.files import read_jsonl
from tests.helpers.adapters import lora, save_adapter, save_folders
from tests.helpers.commands import TINY, save_member
from tests.helpers.grpo import assert_same_weights, mixture, trainer_of
from tests.helpers.members import logits, tiny_member
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


# --- members that are adapters on one base ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    larger = {"r": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    return save_folders(path) | {
        "same": save_adapter(path / "same", str(path / "base"), 3),
        "larger": save_adapter(path / "larger", str(path / "base"), 4, **larger),
        "dora": save_adapter(path / "dora", str(path / "base"), 5, use_dora=True),
        "whole module": save_adapter(path / "whole", str(path / "base"), 6, modules_to_save=["o_proj"]),
    }


def on_one_base(folders, anchor="base", policy="policy adapter"):
    return LogitMixForCausalLM.from_members(folders[policy], folders[anchor], alpha=0.4)


class LogitsRecorder(TrainerCallback):
    """The logits of policy and anchor after each update, before the anchor is replaced."""

    def __init__(self):
        self.members = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.members.append((logits(model, alpha=0.0), logits(model, alpha=1.0)))


@pytest.mark.parametrize(
    ("anchor", "policy"), [("base", "policy adapter"), ("same", "policy adapter"), ("larger", "policy adapter"),
                           ("base", "dora"), ("base", "whole module")],
)  # fmt: skip
def test_the_policys_adapter_becomes_the_anchors(folders, tmp_path, anchor, policy):
    model = on_one_base(folders, anchor, policy)
    start = logits(model, alpha=1.0)
    trainer = trainer_of(tmp_path, model, max_steps=3, reanchor_steps=2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if anchor == "larger" or policy == "dora" else {"rtol": 0, "atol": 0}
    recorder = LogitsRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    first, second, third = recorder.members
    torch.testing.assert_close(first[1], start, **tolerance)
    assert torch.equal(second[1], first[1])
    torch.testing.assert_close(third[1], second[0], **tolerance)
    assert not torch.allclose(third[1], second[1], atol=1e-3)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".policy." in name for name in trained)


@pytest.mark.parametrize(
    ("anchor", "save_frozen"),
    [("base", "once"), pytest.param("base", "never", marks=pytest.mark.slow), ("same", "once")],
)
def test_checkpoints_hold_both_adapters_and_the_base_once(folders, tmp_path, anchor, save_frozen):
    options = {"max_steps": 3, "reanchor_steps": 2, "save_frozen": save_frozen}
    whole = trainer_of(tmp_path, on_one_base(folders, anchor), save_strategy="steps", save_steps=1, **options)
    whole.train()
    for step in (1, 2, 3):
        names = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert all("lora_" in name for name in names)
        assert {name.split(".")[-2] for name in names} == {"policy", "anchor_0"}
    saved = [LogitMixForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert not torch.equal(logits(saved[0], alpha=1.0), logits(saved[1], alpha=1.0))
    assert torch.equal(logits(saved[1], alpha=0.0), logits(saved[1], alpha=1.0)), "the policy became the anchor"
    if save_frozen == "once":
        (stored,) = (tmp_path / STORE).iterdir()
        assert not any("lora_" in name for name in load_file(stored))
    for step in (1, 2):
        again = trainer_of(tmp_path, on_one_base(folders, anchor), **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model.state_dict(), whole.model.state_dict())
    whole.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert same(LogitMixForCausalLM.from_pretrained(folder).state_dict(), whole.model.state_dict())


def test_the_ratio_is_1_before_the_first_update_with_a_new_anchor(folders, tmp_path):
    options = {"max_steps": 4, "reanchor_steps": 2, "num_iterations": 2}
    trainer = trainer_of(tmp_path, on_one_base(folders), **options)
    trainer.train()
    ratios = [(log["ratio/min"], log["ratio/max"]) for log in trainer.state.log_history if "ratio/min" in log]
    assert ratios[0] == ratios[2] == (1, 1)
    assert ratios[1] != (1, 1) != ratios[3]


@pytest.mark.parametrize(
    ("anchor", "policy", "message"),
    [
        ("same", "larger", "the anchor's adapter cannot take the policy's weights: it .* at model.layers.0"),
        ("same", "dora", "it is smaller, or of another kind, at .*; leave out reanchor_steps, or give the policy"),
    ],
)
def test_an_anchors_adapter_without_room_for_the_policys_is_refused(folders, tmp_path, anchor, policy, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, on_one_base(folders, anchor, policy), reanchor_steps=1)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ("qwen2", {"reanchor_steps": 0}, "reanchor_steps is 0, and an outer step has 1 updates"),
        ("qwen2", {"reanchor_steps": 3, "num_iterations": 2}, "an outer step has 2 updates; .* a multiple of 2"),
        ("llama", {"reanchor_steps": 1}, "the weights of policy and anchor cannot be merged: .*; leave out"),
        ("adapters", {"reanchor_steps": 1, "reanchor_to": "merged"}, "merged adapters have the rank of both together"),
        ("adapters", {"reanchor_steps": 1, "offload_anchor": True}, "offload_anchor"),
        (
            "adapter, whole anchor",
            {"reanchor_steps": 1},
            "the policy is an adapter, and the anchor a model of its own",
        ),
        ("two anchors", {"reanchor_steps": 1}, "needs a mixture of a policy and one anchor; leave out"),
        ("qwen2", {"reanchor_steps": 1, "save_frozen": "never"}, "save_frozen is 'never'"),
        ("qwen2", {"reanchor_steps": 1, "offload_anchor": True}, "offload_anchor keeps a copy"),
        ("qwen2", {"reanchor_to": "merged"}, "nothing would read it: it goes with reanchor_steps"),
        ("qwen2", {"reanchor_steps": 1, "reanchor_to": "anchor"}, "reanchor_to"),
    ],
)
def test_what_cannot_be_replaced_is_refused(tmp_path, members, options, message):
    if members == "adapter, whole anchor":
        model = LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1), peft_config=lora())
    elif members == "two anchors":
        policy, *anchors = (tiny_member(seed=seed) for seed in range(3))
        model = LogitMixForCausalLM.from_members(policy, anchors, weights=[0.4, 0.3, 0.3])
    else:
        model = two_process_mixture(adapters=True) if members == "adapters" else mixture(anchor=members)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model, **options)
