"""Training beside an anchor in bfloat16, which is held as its files are."""

import pytest
import torch
from peft import LoraConfig

from logitmix.cli.__main__ import main
from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.config_checks import validate_options
from tests.helpers.adapters import save_adapter
from tests.helpers.commands import error_of
from tests.helpers.grpo import trainer_of
from tests.helpers.members import INPUT, character_tokenizer, logits, tiny_member
from tests.helpers.torchrun import run_two_processes

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    tiny_member("qwen2", 0).save_pretrained(folder / "policy")
    tiny_member("llama", 1, dtype=BF16).save_pretrained(folder / "anchor")
    for name in ("policy", "anchor"):
        character_tokenizer().save_pretrained(folder / name)
    return folder


def trainer(members, run, anchor="anchor", policy="policy", **kwargs):
    return trainer_of(run, str(members / policy), anchor=str(members / anchor), **kwargs)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("options", [{}, {"anchor_states": "recompute"}, {"loss_head": "reference"}], ids=str)
@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_the_ratio_is_exactly_1_before_an_update(members, tmp_path, autocast, options, scheme):
    made = trainer(
        members, tmp_path, bf16=autocast, scheme=scheme, max_steps=1, num_iterations=2, steps_per_generation=2,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    assert [member.dtype for member in made.model.members] == [F32, BF16]
    made.train()
    (log,) = (row for row in made.state.log_history if "ratio/min" in row)
    assert (log["ratio/min"], log["ratio/max"]) == (1.0, 1.0)


def test_the_fused_loss_head_scores_within_the_anchors_rounding(members):
    model = LogitMixForCausalLM.from_members(str(members / "policy"), str(members / "anchor"), alpha=0.4)
    exact = LogitMixForCausalLM.from_members(str(members / "policy"), str(members / "anchor"), alpha=0.4, dtype=F32)
    labels = INPUT["input_ids"].masked_fill(INPUT["attention_mask"] == 0, -100)
    scored = labels[:, 1:] != -100
    with torch.no_grad():
        fused = FusedScorer(model)(**INPUT, labels=labels).log_probs[scored]
        reference, _ = model.score(**INPUT, labels=labels)
        upcast, _ = exact.score(**INPUT, labels=labels)
        fused_upcast = FusedScorer(exact)(**INPUT, labels=labels).log_probs[scored]
    rounding = 0.4 * 2**-8 * logits(model.anchor_0).float().abs().max().item()  # of a logit
    torch.testing.assert_close(fused, reference[scored], atol=2 * rounding, rtol=0)
    torch.testing.assert_close(fused_upcast, upcast[scored], atol=1e-5, rtol=0)  # nothing is rounded there
    torch.testing.assert_close(fused, upcast[scored], atol=20 * rounding, rtol=0)  # activations of three layers are


def test_the_dtype_of_the_anchor_is_its_checkpoints_unless_another_is_chosen(members, tmp_path):
    def dtypes(**kwargs):
        return [member.dtype for member in trainer(members, tmp_path / "run", **kwargs).model.members]

    assert dtypes() == [F32, BF16]
    assert dtypes(anchor_dtype="float32") == [F32, F32]
    assert dtypes(anchor="policy", policy="anchor", anchor_dtype="bfloat16") == [F32, BF16]
    assert dtypes(anchor="policy", model_init_kwargs={"dtype": "bfloat16"}) == [BF16, BF16], "no wider than the policy"
    assert dtypes(model_init_kwargs={"dtype": "bfloat16"}, anchor_dtype="float32") == [BF16, F32]
    save_adapter(tmp_path / "adapter", members / "anchor", seed=2)
    assert dtypes(anchor=tmp_path / "adapter") == [F32, F32], "merging would round it"
    assert dtypes(anchor="policy", peft_config=LoraConfig()) == [F32, F32]

    model = LogitMixForCausalLM.from_members(str(members / "policy"), str(members / "anchor"))
    model.save_pretrained(tmp_path / "mixture")
    made = trainer_of(tmp_path / "run", str(tmp_path / "mixture"))
    assert [member.dtype for member in made.model.members] == [F32, BF16]


def test_what_contradicts_is_refused(members, tmp_path):
    made = trainer(members, tmp_path)
    made.args.anchor = None
    made.args.anchor_dtype = "bfloat16"
    with pytest.raises(ValueError, match=r"anchor_dtype is .*nothing would read it"):
        validate_options(made.args)
    with pytest.raises(ValueError, match="anchor_dtype is 'int8'"):
        trainer(members, tmp_path, anchor_dtype="int8")
    with pytest.raises(ValueError, match="dtype of anchor_0 is bfloat16, but it shares the policy's weights"):
        trainer(members, tmp_path, anchor="policy", peft_config=LoraConfig(), anchor_dtype="bfloat16")


@pytest.mark.parametrize("mode", ["once", "never"])
def test_checkpoints_and_resumed_runs_keep_the_dtypes(members, tmp_path, mode):
    steps = {"save_strategy": "steps", "save_steps": 1, "save_frozen": mode}
    whole = trainer(members, tmp_path / "whole", **steps, max_steps=3)
    whole.train()
    trainer(members, tmp_path / "run", **steps, max_steps=3).train()
    for later in ("checkpoint-2", "checkpoint-3"):
        (tmp_path / "run" / later).rename(tmp_path / later)
    resumed = trainer(members, tmp_path / "run", **steps, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    loaded = LogitMixForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert [member.dtype for member in loaded.members] == [F32, BF16]
    assert torch.equal(logits(loaded), logits(whole.model))


def test_the_command_takes_the_dtype(members, tmp_path, capsys):
    flags = ["train", "--model_name_or_path", str(members / "policy"), "--anchor", str(members / "anchor")]
    flags += ["--task", "arithmetic", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert main([*flags, "--anchor_dtype", "bfloat16", "--dry_run"]) == 0
    assert "anchor_dtype" in capsys.readouterr().out
    assert "anchor_dtype" in error_of(capsys, [*flags, "--anchor_dtype", "int4"])


@pytest.mark.slow
def test_fsdp2_shards_an_anchor_of_another_dtype(tmp_path):
    """One update of the sharded mixture has the gradients of a whole one."""
    run_two_processes(
        """
        import sys
        from pathlib import Path

        import torch
        from accelerate import PartialState

        from tests.helpers.two_processes import BATCHES, trained, trainer_of, use_fsdp2

        folder = Path(sys.argv[1])

        def one_update(name, **kwargs):
            settings = BATCHES["one update"] | {"max_steps": 1, "from_folders": True, "decoding": "joint"}
            settings["anchor_dtype"] = "bfloat16"
            trainer = trainer_of(folder / name, **settings, **kwargs)
            record = trained(trainer)
            dtypes = {n.split(".")[0]: p.dtype for n, p in trainer.model.named_parameters()}
            return {"gradients": record["gradients"][0], "dtypes": dtypes}

        records = {"whole": one_update("whole")}
        use_fsdp2()
        records["sharded"] = one_update("sharded", sharded=True)
        if PartialState().is_main_process:
            torch.save(records, folder.parent / "records.pt")
        """,
        tmp_path,
    )
    records = torch.load(tmp_path / "records.pt")
    for record in records.values():
        assert record["dtypes"] == {"policy": F32, "anchor_0": BF16}
    torch.testing.assert_close(records["sharded"]["gradients"], records["whole"]["gradients"], atol=1e-5, rtol=1e-5)
