"""Checkpoints that refer to the frozen members instead of holding them."""

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitmix.mixture.frozen.references import REFERENCES, STORE
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.checkpointing.folders import fault, last_whole_checkpoint
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.grpo import count_vowels, mixture, trainer_of
from tests.helpers.members import character_tokenizer, logits, tiny_member

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_only_model": False}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The folders of a policy and an anchor, of one architecture with an expensive and a tied head."""
    folder = tmp_path_factory.mktemp("members")
    for name, architecture, seed in (("policy", "qwen2", 0), ("anchor", "llama", 1)):
        tiny_member(architecture, seed).save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    return folder


def built(members, **kwargs):
    return LogitMixForCausalLM.from_members(str(members / "policy"), str(members / "anchor"), alpha=0.4, **kwargs)


def trained(run, model=None, **kwargs):
    """A trainer after its run, which has not saved the model yet."""
    trainer = trainer_of(run, model or mixture(), **(STEPS | kwargs))
    trainer.train()
    return trainer


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_each_frozen_member_is_stored_once_and_checkpoints_load_bit_for_bit(tmp_path):
    trainer = trained(tmp_path / "run")
    expected = logits(trainer.model)
    one, two = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2))
    for checkpoint in (one, two):
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            assert all(name.startswith("policy.") for name in file.keys())  # noqa: SIM118
    (stored,) = (tmp_path / "run" / STORE).iterdir()
    assert all(name.startswith("anchor_0.") for name in load_file(stored))
    for load in (LogitMixForCausalLM, AutoModelForCausalLM):
        model, info = load.from_pretrained(two, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(logits(model), expected)
        assert model.name_or_path == str(two)
        assert model.generation_config.to_dict() == trainer.model.generation_config.to_dict()
    assert not torch.equal(logits(LogitMixForCausalLM.from_pretrained(one)), expected)

    trainer.save_model()
    assert not (tmp_path / "run" / STORE).exists(), "the model is whole, and checkpoints refer to it now"
    assert {name.split(".")[0] for name in load_file(tmp_path / "run" / "model.safetensors")} == {"policy", "anchor_0"}
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run")), expected)
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(two)), expected)
    assert fault(two) is None


def test_the_disk_of_a_run(tmp_path):
    sizes = {}
    for mode in ("once", "always"):
        model = LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1))
        trained(tmp_path / mode, model, save_frozen=mode, max_steps=5).save_model()
        sizes[mode] = size(tmp_path / mode)
    assert sizes["once"] <= 0.62 * sizes["always"]


@pytest.mark.parametrize("mode", ["once", "always", "never"])
def test_the_disk_that_a_checkpoint_is_said_to_take_is_what_it_writes(members, tmp_path, mode):
    run, needed = tmp_path / mode, []
    trainer = trainer_of(run, built(members), **STEPS, save_frozen=mode)
    save = trainer._save_checkpoint

    def saved(*args):
        needed.append(trainer.checkpointing._bytes_to_save())
        before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        save(*args)
        written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) - before
        needed[-1] = needed[-1] / written

    trainer._save_checkpoint = saved
    trainer.train()
    assert needed == pytest.approx([1, 1], abs=0.25), "the rest are small files, large beside these members"


def test_a_run_may_be_moved_and_a_checkpoint_copied_out_of_it(tmp_path):
    trainer = trained(tmp_path / "run")
    expected = logits(trainer.model)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "alone" / "anything")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "alone" / "anything")), expected)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "moved" / "checkpoint-2")), expected)
    (tmp_path / "link").symlink_to(tmp_path / "moved" / "checkpoint-2")
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "link")), expected)
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "moved", subfolder="checkpoint-2")
    assert torch.equal(logits(loaded), expected)
    (tmp_path / "moved" / "abandoned-1").mkdir()
    shutil.move(tmp_path / "moved" / "checkpoint-2", tmp_path / "moved" / "abandoned-1" / "checkpoint-2")
    aside = tmp_path / "moved" / "abandoned-1" / "checkpoint-2"
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(aside)), expected)

    (stored,) = (tmp_path / "moved" / STORE).iterdir()
    missing = rf"does not hold the frozen weights of anchor_0.*{STORE}/{stored.name}.*where it was, in {tmp_path}/run"
    with pytest.raises(ValueError, match=missing):
        LogitMixForCausalLM.from_pretrained(tmp_path / "alone" / "anything")


def test_what_is_missing_is_named_and_such_a_checkpoint_is_not_whole(tmp_path):
    trained(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (stored,) = (tmp_path / "run" / STORE).iterdir()
    os.truncate(stored, stored.stat().st_size - 1)
    assert fault(checkpoint).startswith(f"its {STORE}/{stored.name} has")
    stored.unlink()
    assert f"{STORE}/{stored.name}, which is missing" in fault(checkpoint)
    assert last_whole_checkpoint(tmp_path / "run") is None
    with pytest.raises(ValueError, match="which is missing: it is neither in"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / REFERENCES).write_text('{"store"')
    with pytest.raises(ValueError, match=rf"{REFERENCES} is damaged"):
        LogitMixForCausalLM.from_pretrained(checkpoint)


def change(path):
    """Change one weight of a safetensors file, and not its size."""
    weights = load_file(path)
    name = next(name for name in weights if "anchor" in name or "lm_head" in name)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})


def test_a_frozen_member_that_changed_in_the_run_is_refused_by_name(tmp_path):
    trained(tmp_path / "run")
    (stored,) = (tmp_path / "run" / STORE).iterdir()
    change(stored)
    assert fault(tmp_path / "run" / "checkpoint-2") is None, "its size is the same"
    with pytest.raises(ValueError, match=r"frozen weights of anchor_0 in .* are not those that the run saved"):
        LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    resumed = trainer_of(tmp_path / "run", mixture(), **(STEPS | {"max_steps": 3}))
    with pytest.raises(ValueError, match=r"frozen weights of anchor_0 in .* are not those that the run saved"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("mode", ["once", "never"])
def test_an_anchor_whose_folder_changed_since_the_run_began_is_refused_by_name(members, tmp_path, mode):
    shutil.copytree(members, tmp_path / "members")
    trained(tmp_path / "run", built(tmp_path / "members"), save_frozen=mode)
    change(tmp_path / "members" / "anchor" / "model.safetensors")
    resumed = trainer_of(tmp_path / "run", built(tmp_path / "members"), **(STEPS | {"max_steps": 3}), save_frozen=mode)
    with pytest.raises(ValueError, match=r"frozen anchor_0 at .*anchor' has changed since the run began"):
        resumed.train(resume_from_checkpoint=True)
    if mode == "never":
        with pytest.raises(ValueError, match=r"frozen anchor_0 at .*anchor' has changed since the run began"):
            LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


def test_a_run_that_never_saves_its_frozen_members_refers_to_their_folders(members, tmp_path):
    shutil.copytree(members, tmp_path / "all" / "members")
    run = tmp_path / "all" / "run"
    trainer = trained(run, built(tmp_path / "all" / "members"), save_frozen="never")
    trainer.save_model()
    expected = logits(trainer.model)
    for folder in (run, run / "checkpoint-2"):
        assert not any("anchor" in name for name in load_file(folder / "model.safetensors"))
        model = LogitMixForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(model), expected)
        assert model.name_or_path == str(folder)
        assert not any(p.requires_grad for p in model.anchor_0.parameters())
    assert not (run / STORE).exists()

    (tmp_path / "all").rename(tmp_path / "moved")  # with the members: their relative place is the same
    assert torch.equal(
        logits(LogitMixForCausalLM.from_pretrained(tmp_path / "moved" / "run" / "checkpoint-2")), expected
    )
    shutil.rmtree(tmp_path / "moved" / "members")
    with pytest.raises(ValueError, match=rf"saved without its frozen anchor_0.*where it was, at {tmp_path}/all"):
        LogitMixForCausalLM.from_pretrained(tmp_path / "moved" / "run" / "checkpoint-2")


def test_members_loaded_from_folders_are_found_there_where_the_run_has_lost_them(members, tmp_path):
    trainer = trained(tmp_path / "run", built(members))
    expected = logits(trainer.model)
    shutil.rmtree(tmp_path / "run" / STORE)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert fault(checkpoint) is None
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(checkpoint)), expected)
    resumed = trainer_of(tmp_path / "run", built(members), **(STEPS | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / STORE).exists()


def test_never_needs_folders_to_refer_to(members, tmp_path):
    with pytest.raises(ValueError, match="save_frozen is 'never', but anchor_0 was not loaded from a folder"):
        trainer_of(tmp_path, mixture(), save_frozen="never")
    trained(tmp_path / "run", built(members), save_frozen="never")
    resumed = trainer_of(tmp_path / "run", mixture(), **(STEPS | {"max_steps": 3}))
    with pytest.raises(ValueError, match="was saved without anchor_0, and the model that resumes was not built from"):
        resumed.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="save_frozen is 'sometimes'"):
        trainer_of(tmp_path, mixture(), save_frozen="sometimes")


@pytest.mark.parametrize("mode", ["once", "never"])
@pytest.mark.parametrize("anchor", ["anchor", "policy", "adapter"], ids=["model", "base", "adapter"])
def test_adapters_leave_their_base_out_of_checkpoints(members, tmp_path, anchor, mode):
    source = members / anchor
    if anchor == "adapter":
        source = tmp_path / "adapter"
        adapted = LogitMixForCausalLM.from_members(
            str(members / "policy"), str(members / "anchor"), peft_config=LoraConfig(init_lora_weights=False, r=2)
        )
        adapted.export_member("policy", source)
    model = LogitMixForCausalLM.from_members(
        str(members / "policy"), str(source), alpha=0.4, peft_config=LoraConfig(r=2, modules_to_save=["lm_head"])
    )
    trainer = trained(tmp_path / "run", model, save_frozen=mode, loss_head="reference")
    names = set(load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors"))
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
    expected = logits(trainer.model)
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(loaded), expected)
    trainer.save_model()
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run")), expected)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_experts_and_tied_heads_are_restored(tmp_path, architecture):
    trainer = trained(tmp_path / "run", mixture(anchor=architecture, policy=architecture))
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_a_finished_run_that_continues_keeps_its_checkpoints_readable(tmp_path):
    trained(tmp_path / "run").save_model()
    early = logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1"))
    resumed = trainer_of(tmp_path / "run", mixture(), **(STEPS | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / STORE).exists(), "until the new model is whole"
    (tmp_path / "run" / "model.safetensors").unlink()
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")), early)
    resumed.save_model()
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")), early)

    seen = []  # what is on disk while the same model is written again, with no step left
    again = trainer_of(tmp_path / "run", mixture(), **(STEPS | {"max_steps": 3}))
    again.train(resume_from_checkpoint=True)
    save = again.model.save_pretrained

    def watched(*args, **kwargs):
        seen.append((tmp_path / "run" / STORE).exists())
        save(*args, **kwargs)

    again.model.save_pretrained = watched
    again.save_model()
    assert seen[-1]
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")), early)


def test_another_run_in_the_folder_has_a_copy_of_its_own(tmp_path):
    first = trained(tmp_path / "run")
    expected = logits(first.model)
    shutil.move(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "kept")
    trained(tmp_path / "run", mixture(anchor="qwen2"))
    assert len(list((tmp_path / "run" / STORE).iterdir())) == 2
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "kept")), expected)


def test_a_whole_checkpoint_of_before_resumes(tmp_path):
    trained(tmp_path / "old", save_frozen="always")
    assert not (tmp_path / "old" / "checkpoint-2" / REFERENCES).exists()
    resumed = trainer_of(tmp_path / "old", mixture(), **(STEPS | {"max_steps": 3}))
    resumed.train(resume_from_checkpoint=True)
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "old" / "checkpoint-3")
    assert torch.equal(logits(loaded), logits(resumed.model))
    assert json.loads((tmp_path / "old" / "checkpoint-3" / REFERENCES).read_text())["store"]


def test_the_best_checkpoint_is_loaded_and_old_ones_are_deleted(tmp_path, caplog):
    config = LogitMixGRPOConfig(
        str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=3,
        save_steps=1, save_total_limit=1, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="reward", learning_rate=1e-2, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[],
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["ab=", "x"] * 4})
    trainer = LogitMixGRPOTrainer(
        mixture(), count_vowels, config, train_dataset=rows, eval_dataset=rows.select(range(4)),
        processing_class=character_tokenizer(),
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(best)), logits(trainer.model))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 2
    assert "missing keys" not in caplog.text


def test_what_is_pushed_during_training_is_whole(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, mixture(), **STEPS)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    assert type(trainer.checkpointing.frozen)(trainer).mode == "always"
    monkeypatch.setattr(trainer.args, "hub_strategy", "end")
    assert type(trainer.checkpointing.frozen)(trainer).mode == "once"


def test_saving_over_a_checkpoint_with_references_makes_it_whole(tmp_path):
    trainer = trained(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    LogitMixForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint)
    shutil.rmtree(tmp_path / "run" / STORE)
    assert torch.equal(logits(LogitMixForCausalLM.from_pretrained(checkpoint)), logits(trainer.model))
