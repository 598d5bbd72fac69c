"""Two processes train like one: DDP and FSDP2 against the same rollouts in a single process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM

from logitmix.training.fsdp import configure_plugin
from tests.helpers.paths import ROOT
from tests.helpers.two_processes import BATCHES, RECIPES, VARIANTS, mixture, trainer_of

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "helpers" / "two_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def records(folder):
    """The records of both processes, for each training in two_processes.py."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "ddp.yaml")]
    flags = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, *flags, str(WORKER), str(folder)], capture_output=True, text=True, timeout=960, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def alone(folder, records, batch, **members):
    """One process on the two processes' rollouts: losses, gradients of each update and the weights at the end."""
    updates = batch.get("steps_per_generation", 1) // batch.get("gradient_accumulation_steps", 1) or 1
    micro_batches = batch.get("gradient_accumulation_steps", 1)
    rows = 2 * batch["per_device_train_batch_size"] * micro_batches
    trainer = trainer_of(folder, **members, per_device_train_batch_size=rows, steps_per_generation=updates)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    parameters = dict(trainer.model.named_parameters())
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.1)
    losses, gradients, advantages = [], [], []
    for step in range(2):
        if step % updates == 0:
            outer_step = step // updates
            prompts = [p for record in records for p in record["outer steps"][outer_step][0]]
            replayed = [ids for record in records for ids in record["rollouts"][outer_step]], None
            trainer._generate_single_turn = lambda *args, replayed=replayed, **kwargs: replayed
            inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
            advantages.append(inputs["advantages"])
        window = slice(step * micro_batches, (step + 1) * micro_batches)
        taken = [row for record in records for rows_of in record["taken"][window] for row in rows_of]
        part = {k: v[taken] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in inputs.items()}
        if "anchor_states" in inputs:
            part["anchor_states"] = [inputs["anchor_states"][row] for row in taken]
        loss = trainer._compute_loss(trainer.model, part)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 2)  # the Trainer's linear schedule
        optimizer.step()
    return losses, gradients, advantages, {name: p.detach() for name, p in parameters.items()}


MEMBERS = {"tied", "adapters"}  # arguments that make other members
TRAININGS = {name: (name, batch, {}) for name, batch in BATCHES.items()}
TRAININGS |= {f"sharded, {name}": (f"sharded, {name}", batch, {}) for name, batch in BATCHES.items()}
TRAININGS |= {
    f"sharded, {name}": (f"sharded, {name}", BATCHES["one update"], {k: variant[k] for k in MEMBERS & variant.keys()})
    for name, variant in VARIANTS.items()
}


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_gradients_and_weights_are_those_of_one_process(records, tmp_path, name):
    key, batch, members = TRAININGS[name]
    ours = [record[key] for record in records]
    losses, gradients, advantages, weights = alone(tmp_path, ours, batch, **members)
    for outer_step, expected in enumerate(advantages):
        both = torch.cat([record["outer steps"][outer_step][1] for record in ours])
        torch.testing.assert_close(both, expected, atol=1e-6, rtol=1e-5)
    assert ours[0]["losses"] == pytest.approx(losses, abs=1e-5)
    assert max(map(abs, losses)) > 1e-3
    for record in ours:
        for update, expected in zip(record["gradients"], gradients, strict=True):
            torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(record["weights"], weights, atol=1e-5, rtol=1e-5)
    assert not any(parameter.startswith("anchor") for parameter in gradients[0])


def test_a_question_may_lie_across_both_processes(records):
    prompts = [record["one update"]["outer steps"][0][0] for record in records]
    assert prompts[0][-1] == prompts[1][0]


def test_processes_sample_different_rollouts_of_one_prompt(records):
    first, second = (record["accumulated"] for record in records)
    assert first["outer steps"][0][0] == second["outer steps"][0][0] == ["ab="] * 6
    assert first["rollouts"][0] != second["rollouts"][0]


def test_the_frozen_anchor_is_sharded_as_the_policy_is(records):
    for record in records:
        shares = record["sharded, gradient checkpointing"]["shares"]
        assert shares.keys() == {"policy", "anchor_0"}
        assert all(share == pytest.approx(0.5, abs=0.05) for share in shares.values()), shares


def test_gradients_stay_sharded_from_one_micro_batch_to_the_next(records):
    for record in records:
        kept = record["sharded, accumulated"]["kept sharded"]
        assert kept
        assert all(kept)
        assert not any(record["accumulated"]["kept sharded"])


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_run_goes_on_from_its_checkpoint_and_is_saved_whole(records, folder, kind):
    saved = AutoModelForCausalLM.from_pretrained(folder / kind)
    assert saved.config.architectures == ["LogitMixForCausalLM"]
    for record in records:
        for weights in (record[kind]["resumed"], dict(saved.named_parameters())):
            torch.testing.assert_close(weights, record[kind]["run"], atol=0, rtol=0)


def test_processes_may_generate_unequally_with_the_weights_gathered(records):
    assert [record["uneven"] for record in records] == [1, 2]


def test_a_run_in_bf16_rounds_neither_log_probabilities_nor_alpha_nor_gradients(records):
    for record in records:
        log_probs = record["bf16"]["log_probs"]
        assert log_probs.dtype == torch.float32
        assert (log_probs != log_probs.bfloat16()).any()
        torch.testing.assert_close(record["bf16"]["rows"], record["bf16"]["batch"], atol=0, rtol=0)
        assert {gradient.dtype for gradient in record["bf16"]["gradients"].values()} == {torch.float32}


def test_the_first_version_of_fsdp_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ValueError, match="fsdp_version is 1; a mixture is sharded by FSDP2 only"):
        configure_plugin(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_the_mixture_names_its_members_layers():
    """accelerate reads them: TRANSFORMER_BASED_WRAP makes each a unit."""
    assert mixture()._no_split_modules == {"Qwen2DecoderLayer", "LlamaDecoderLayer"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_configurations_are_accelerates(name):
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 8, "bf16")
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert config.distributed_type == kinds[name]
    # accelerate passes over keys of these that it does not know
    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    assert known >= config.fsdp_config.keys() | config.deepspeed_config.keys()
