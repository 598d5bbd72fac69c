"""GRPO with LoRA adapters as members: it scores what it samples, and trains only the policy's adapter."""

import copy
import json

import pytest
import torch
from peft import LNTuningConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from logitmix.cli.__main__ import main
from logitmix.cli.options.lora import AdapterArguments
from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import KINDS, anchor_of, lora, merged_mixture, mixture, reference, save_folders
from tests.helpers.commands import TINY, error_of
from tests.helpers.grpo import assert_same_weights, generated, sampled, trainer_of
from tests.helpers.members import logits, tiny_member


@pytest.fixture
def folders(tmp_path):
    return save_folders(tmp_path)


def adapter_trainer(kind, folders, output_dir, scheme="logit", model=None, **kwargs):
    """A trainer with a new adapter for the policy, built from folders as a user would."""
    return trainer_of(
        output_dir, folders["base"], anchor=anchor_of(kind, folders), alpha=0.4, scheme=scheme,
        peft_config=lora(lora_dropout=0.0), **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["logit", "prob"])
@pytest.mark.parametrize("kind", KINDS)
def test_scored_log_probs_are_those_of_the_distribution_sampled_from(kind, scheme, folders, tmp_path):
    trainer = adapter_trainer(kind, folders, tmp_path / "run", scheme, temperature=0.7, max_steps=4)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = max((value - before[name]).abs().max() for name, value in trainer.model.state_dict().items())
    assert moved > 1e-2, "the contract is about a trained policy"
    ids, mask, length, expected = sampled(trainer)
    with torch.no_grad():
        scored, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, compute_entropy=True
        )
        policy_alone, _ = trainer.model.score(ids, mask, ids, temperature=0.7, alpha=0.0)
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)
    assert (policy_alone[:, -length:] - expected).abs().max() > 0.05, "the policy alone is another distribution"
    assert (entropy > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_dropout_does_not_move_the_ratio(kind, folders, tmp_path):
    """The ratio is 1 before the first update; dropout would differ between two scorings."""
    config = lora(lora_dropout=0.3, init_lora_weights=False)
    options = {"anchor": anchor_of(kind, folders), "steps_per_generation": 2, "peft_config": config, "max_steps": 1}
    for is_disabled, moves in (({}, False), ({"disable_dropout": False}, True)):
        trainer = trainer_of(tmp_path / str(moves), folders["base"], **options, **is_disabled)
        trainer.train()
        ratios = [trainer.state.log_history[0][name] for name in ("ratio/min", "ratio/max")]
        assert (ratios != pytest.approx([1, 1], abs=1e-4)) is moves
        assert trainer.model.policy.peft_config["policy"].lora_dropout == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_policys_adapter_and_no_bit_of_the_anchor(kind, folders, tmp_path):
    trainer = adapter_trainer(kind, folders, tmp_path / "run", beta=0.1, loss_type="grpo", kl_to="anchor")
    before, anchor = copy.deepcopy(trainer.model.state_dict()), logits(trainer.model, alpha=1.0)
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".policy.weight" in name}
    assert torch.equal(logits(trainer.model, alpha=1.0), anchor)
    torch.testing.assert_close(anchor, logits(reference(anchor_of(kind, folders))))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_full_models_with_the_adapters_merged(kind, folders, tmp_path):
    """For W = W_0 + s B A: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    adapted = trainer_of(tmp_path / "adapted", mixture(kind, folders), temperature=0.7)
    full = trainer_of(tmp_path / "full", merged_mixture(kind, folders), temperature=0.7)
    inputs, _, _ = generated(adapted)
    losses = []
    for trainer in (adapted, full):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert losses[0].abs() > 1e-3
    paths = [name.removesuffix(".lora_A.policy.weight") for name, _ in adapted.model.named_parameters()
             if name.endswith("lora_A.policy.weight")]  # fmt: skip
    assert len(paths) == 6
    for path in paths:
        module, gradient = adapted.model.get_submodule(path), full.model.get_submodule(path).weight.grad
        a, b, scale = module.lora_A["policy"].weight, module.lora_B["policy"].weight, module.scaling["policy"]
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, atol=1e-5, rtol=1e-4)
    trained = {name for name, p in adapted.model.named_parameters() if p.grad is not None}
    assert all(".policy.weight" in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_steps(kind, folders, tmp_path):
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = adapter_trainer(kind, folders, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer.train()
        trained.append(trainer.model)
    assert_same_weights(*trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_its_checkpoint(kind, folders, tmp_path):
    models = []
    for name, steps in (("whole", None), ("half", 2)):
        torch.manual_seed(0)
        saving = {} if steps is None else {"save_strategy": "steps", "save_steps": steps}
        trainer = adapter_trainer(kind, folders, tmp_path / name, max_steps=4, **saving)
        trainer.train()
        models.append(trainer.model)
    resumed = adapter_trainer(kind, folders, tmp_path / "half", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert_same_weights(resumed.model, models[0])
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "half" / "checkpoint-4")
    torch.testing.assert_close(logits(loaded), logits(models[1].eval()))


def test_an_adapter_without_an_anchor_trains_as_trl_does(folders, tmp_path):
    models = []
    for name, kind in (("ours", None), ("theirs", GRPOTrainer)):
        torch.manual_seed(0)
        choice = {} if kind is None else {"trainer": kind}
        trainer = trainer_of(
            tmp_path / name, AutoModelForCausalLM.from_pretrained(folders["base"]), loss_type="grpo",
            peft_config=lora(), **choice,
        )  # fmt: skip
        trainer.train()
        models.append(trainer.model)
    assert all(isinstance(model, PeftModel) for model in models)
    assert_same_weights(*models)


def test_without_an_anchor_any_kind_of_adapter_goes_to_trl(folders, tmp_path):
    trainer = trainer_of(tmp_path, folders["base"], peft_config=LNTuningConfig(task_type="CAUSAL_LM"))
    assert isinstance(trainer.model, PeftModel)


def test_what_cannot_be_adapted_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"policy_adapter' is an adapter already.*merge it first"):
        trainer_of(tmp_path, folders["policy adapter"], peft_config=lora())
    model = LogitMixForCausalLM.from_members(tiny_member(seed=0), tiny_member(seed=1))
    with pytest.raises(ValueError, match="the model is a mixture already; give its members' names"):
        trainer_of(tmp_path, model, peft_config=lora())
    wrapped = get_peft_model(model, lora(target_modules=r"policy\..*q_proj"))
    with pytest.raises(ValueError, match="a mixture that PEFT has wrapped"):
        trainer_of(tmp_path, wrapped)


# --- from the command line ------------------------------------------------------------------------------------------

LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--train_limit", "64"]


def few_logits(model, **kwargs):
    """With tokens of the arithmetic task's small vocabulary."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 9)[None], **kwargs).logits


def test_an_adapter_for_an_anchor_then_one_for_the_policy_on_one_base(members, tmp_path, capsys, monkeypatch):
    base, _ = members
    monkeypatch.setenv("COLUMNS", "500")
    sft = ["sft", "--model_name_or_path", base, "--output_dir", str(tmp_path / "sft"), *CPU, "--max_steps", "2"]
    assert main([*sft, "--learning_rate", "1e-2", *LORA]) == 0
    assert json.loads((tmp_path / "sft" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert not (tmp_path / "sft" / "config.json").exists()

    train = ["train", "--model_name_or_path", base, "--anchor", str(tmp_path / "sft"), *TINY, *LORA]
    assert main([*train, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]) == 0
    assert "Members share one base: weights take" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.jsonl").read_text())["arguments"]["lora_r"] == 4
    model = LogitMixForCausalLM.from_pretrained(tmp_path / "run")
    assert set(model.config.adapters) == {"policy", "anchor_0"}

    for flags, kind in (([], "adapter_config.json"), (["--merge"], "config.json")):
        folder = tmp_path / f"export_{kind}"
        export = ["export", "--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(folder), *flags]
        assert main(export) == 0
        assert (folder / kind).exists()
        exported = few_logits(AutoModelForCausalLM.from_pretrained(folder))
        torch.testing.assert_close(exported, few_logits(model, alpha=0.0), atol=1e-5, rtol=1e-5)
        assert f"{folder} exists" in error_of(capsys, export)

    merge = ["export", "--model_name_or_path", str(tmp_path / "sft"), "--output_dir", str(tmp_path / "merged")]
    assert "add --merge to merge it into its base" in error_of(capsys, merge)
    assert main([*merge, "--merge"]) == 0
    merged = few_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, few_logits(model, alpha=1.0), atol=1e-5, rtol=1e-5)

    capsys.readouterr()
    evaluate = ["eval", "--model_name_or_path", str(tmp_path / "export_adapter_config.json"), "--eval_limit", "4"]
    assert main([*evaluate, "--anchor", str(tmp_path / "sft"), "--max_new_tokens", "8"]) == 0
    assert "mixture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("train", ["--lora_r", "4"], "lora_r is 4, but there is no adapter; add --use_peft"),
        ("sft", ["--use_dora"], "use_dora is True, but there is no adapter; add --use_peft"),
        ("train", ["--use_peft", "--lora_target_modules", "nowhere"], "'nowhere' in target_modules is no module"),
        ("train", ["--use_peft", "--lora_target_modules", ".*nowhere"], "adapter of policy does not fit"),
        (
            "train",
            ["--use_peft", "--lora_target_modules", "q_proj", "v_prj"],
            "'v_prj' in target_modules is no module",
        ),
        ("sft", ["--use_peft", "--lora_modules_to_save", "head"], "'head' in modules_to_save is no module of"),
        ("train", ["--use_peft", "--lora_alpha", "0"], "lora_alpha is 0, which scales the adapter to 0"),
        ("train", ["--use_peft", "--lora_r", "0"], "adapter of policy does not fit"),
    ],
)
def test_flags_that_make_no_adapter_are_refused(members, verb, flags, message, tmp_path, capsys):
    base, sft = members
    anchor = ["--anchor", sft] if verb == "train" else []
    command = [verb, "--model_name_or_path", base, *anchor, "--output_dir", str(tmp_path / "run"), *CPU, *flags]
    assert message in error_of(capsys, command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.1\..*q_proj"], r".*\.1\..*q_proj"),
    ],
)
def test_target_modules_are_names_or_one_pattern(names, expected):
    config = AdapterArguments(use_peft=True, lora_target_modules=names).peft_config
    assert config.target_modules == expected
