"""The script of tests/training/test_processes.py: trainings in two processes that record what each process sampled,
trained on, and obtained.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from logitmix.mixture.generation import generate_completions
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.members import character_tokenizer, tiny_member
from tests.helpers.paths import ROOT

RECIPES = ROOT / "configs" / "accelerate"
PROMPTS = ["ab=", "12+34-5=", "x"]
GENERATIONS = 4
ALPHA = 0.3

# 12 or 24 rollouts in an outer step, 6 or 12 per process: the 4 rollouts of a question are split between the two
BATCHES = {
    "one update": {"per_device_train_batch_size": 6},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "two updates": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
}


# How else a sharded training may be set up, with the same outcome
VARIANTS = {
    "tied": {"tied": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gathering for every token": {"ds3_gather_for_generation": False},
    "members from folders": {"from_folders": True},
    "adapters on one base": {"adapters": True},
}


def count_vowels(completions, **kwargs):
    return [float(sum(c in "aeiou" for c in completion)) for completion in completions]


def members(tied=False):
    return (
        tiny_member("qwen2", seed=0, tie_word_embeddings=tied),
        tiny_member("llama", seed=1, tie_word_embeddings=tied),
    )


def mixture(tied=False, adapters=False):
    if adapters:
        base, _ = members()
        torch.manual_seed(5)
        peft_config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return LogitMixForCausalLM.from_members(base, base, alpha=ALPHA, peft_config=peft_config)
    return LogitMixForCausalLM.from_members(*members(tied), alpha=ALPHA)


def save_members(folder):
    for name, member in zip(("policy", "anchor"), members(), strict=True):
        member.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)


class RecordingTrainer(LogitMixGRPOTrainer):
    """Records the prompts, rollouts and advantages of each outer step, and the rows (of all processes) in each
    micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.outer_steps, self.rollouts, self.taken = [], [], []

    def _generate_single_turn(self, *args, **kwargs):
        output = super()._generate_single_turn(*args, **kwargs)
        self.rollouts.append(output[0])
        return output

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = len(inputs)
        output["row"] = torch.arange(rows) + rows * self.accelerator.process_index
        self.outer_steps.append(
            ([row["prompt"] for row in inputs], output["advantages"], output["num_items_in_batch"])
        )
        return output

    def _compute_loss(self, model, inputs):
        self.taken.append(inputs["row"].tolist())
        return super()._compute_loss(model, inputs)


class Gradients(TrainerCallback):
    """The gradients of each update, whole, and which of those that a micro-batch leaves to the next are shards."""

    def __init__(self):
        self.updates, self.kept_sharded = [], []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.kept_sharded += [isinstance(p.grad, DTensor) for p in trainable]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({name: whole(p.grad) for name, p in named_parameters(model) if p.grad is not None})


def named_parameters(model):
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trainer_of(folder, prompts=PROMPTS, sharded=False, tied=False, adapters=False, from_folders=False, **kwargs):
    arguments = {
        "num_generations": GENERATIONS,
        "max_completion_length": 9,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam would make the sign of a gradient's rounding error into a step
        "max_grad_norm": 0.0,
        **SMALL_RUN,
    } | kwargs
    args = LogitMixGRPOConfig(str(folder), **arguments)
    if sharded:
        # accelerate shards on what it takes for accelerators alone; all that follows runs on the CPU all the same
        PartialState().distributed_type = DistributedType.MULTI_GPU
    if from_folders:
        model, args.anchor, args.alpha = str(folder / "policy"), str(folder / "anchor"), ALPHA
        if PartialState().is_main_process:
            save_members(folder)
        PartialState().wait_for_everyone()
    else:
        model = mixture(tied, adapters)
    return RecordingTrainer(
        model,
        reward_funcs=count_vowels,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
        processing_class=character_tokenizer(),
    )


def trained(trainer, **kwargs):
    """Train, and return the record of this process."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(**kwargs)
    return {
        "outer steps": trainer.outer_steps,
        "rollouts": trainer.rollouts,
        "taken": trainer.taken,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "gradients": gradients.updates,
        "kept sharded": gradients.kept_sharded,
        "weights": {name: whole(p) for name, p in named_parameters(trainer.model)},
    }


def use_fsdp2(mixed_precision="no", **settings):
    """Set the environment as `accelerate launch --config_file configs/accelerate/fsdp2.yaml` does."""
    flags = ["--config_file", str(RECIPES / "fsdp2.yaml"), "--mixed_precision", mixed_precision, "a_script.py"]
    env = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(flags))[0])
    os.environ |= {key: value for key, value in env.items() if "FSDP" in key} | settings


def local_shares(model):
    """The part of each member's numbers that this process holds."""
    return {
        name: sum(p.to_local().numel() for p in member.parameters()) / sum(p.numel() for p in member.parameters())
        for name, member in model.named_children()
    }


def resumed(folder, state_dict_type):
    """Weights of a run, and of its resumption from its first step; the folder holds the model that it saved."""
    use_fsdp2(FSDP_STATE_DICT_TYPE=state_dict_type)
    settings = BATCHES["one update"] | {"sharded": True, "tied": True, "optim": "adamw_torch"}
    whole_run = trainer_of(folder, **settings, save_strategy="steps", save_steps=1)
    weights = trained(whole_run)["weights"]
    whole_run.save_model()
    PartialState().wait_for_everyone()
    again = trained(trainer_of(folder, **settings), resume_from_checkpoint=str(folder / "checkpoint-1"))["weights"]
    saved = LogitMixForCausalLM.from_pretrained(folder)
    return {
        "run": weights,
        "resumed": again,
        "saved": dict(saved.named_parameters()),
        "classes": saved.config.architectures,
    }


def in_bf16(folder):
    """Log-probabilities as the trainer scores them, and logits at one alpha a sequence and at one for all."""
    use_fsdp2(mixed_precision="bf16")
    trainer = trainer_of(folder, **BATCHES["one update"], sharded=True, bf16=True, max_steps=1)
    record = trained(trainer)
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        log_probs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
        rows = trainer.model(ids, attention_mask=mask, alpha=torch.tensor([0.329, 0.329])).logits
        batch = trainer.model(ids, attention_mask=mask, alpha=0.329).logits
    return {"log_probs": log_probs, "rows": rows, "batch": batch, "gradients": record["gradients"][0]}


def uneven(folder):
    """How many prompts this process has completed: one more than the process before it."""
    use_fsdp2()
    trainer = trainer_of(folder, **BATCHES["one update"], sharded=True, max_steps=1)
    trainer.train()
    done = 0
    with trainer.generation_model() as model:
        for _ in range(1 + PartialState().process_index):
            settings = {"max_new_tokens": 5 + 5 * PartialState().process_index, "eos_token_id": None}
            done += len(generate_completions(model, trainer.processing_class, [[5, 6]], settings))
    return done


def main(out):
    records = {
        name: trained(trainer_of(out / name, prompts=["ab="] * 3 if name == "accumulated" else PROMPTS, **batch))
        for name, batch in BATCHES.items()
    }
    use_fsdp2()
    for name, batch in BATCHES.items():
        records["sharded, " + name] = trained(trainer_of(out / name, sharded=True, **batch))
    for name, variant in VARIANTS.items():
        trainer = trainer_of(out / name, sharded=True, **BATCHES["one update"] | variant)
        records["sharded, " + name] = trained(trainer) | {"shares": local_shares(trainer.model)}
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        records[kind] = resumed(out / kind, kind)
    records["uneven"] = uneven(out / "uneven")
    records["bf16"] = in_bf16(out / "bf16")
    torch.save(records, out / f"{PartialState().process_index}.pt")
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that exits while they run


if __name__ == "__main__":
    main(Path(sys.argv[1]))
