"""A mixture under FSDP2, in what accelerate and TRL's trainer leave open.

They shard the decoder layers of all members, the anchors' too, each layer a unit; what is left (embeddings, norms,
heads) is the root's unit. Three things do not fit a mixture as they come:

- accelerate's bf16 policy rounds what the root takes and gives, so weights a sequence and log-probabilities;
- a policy's tied embeddings would be one matrix in two units, since a mixture has no output embeddings to ask for;
- `generate` gathers every layer again for every token.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from logitmix.mixture.modeling import LogitMixForCausalLM


class ShardableGRPOTrainer(GRPOTrainer):
    """TRL's trainer, for a model that FSDP2 may shard.

    Raises `ValueError` for a mixture under the first version of FSDP.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, LogitMixForCausalLM):
            check_fsdp(self.accelerator)
        if self.is_fsdp_enabled:
            # Else the gradients of all but the last micro-batch of an update would be kept whole on every process
            asked = self.args.accelerator_config.gradient_accumulation_kwargs or {}
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = asked.get("sync_each_batch", True)

    @contextmanager
    def generation_model(self) -> Iterator[PreTrainedModel]:
        """The model to generate with; sharded weights are gathered once, unless `ds3_gather_for_generation` is False.

        All processes enter together. Inside, each may generate as much as it likes, but with the flag off, where
        every forward gathers and all must take as many.
        """
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            if plugin is None or not self.args.ds3_gather_for_generation:
                yield model
                return
            with gathered_weights(model, plugin.reshard_after_forward):
                yield model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with policy_head_shown(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a sharded model is saved whole, but for checkpoints, which are as the plugin says."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with whole_state_dict(self.accelerator):
            super().save_model(output_dir)


def check_fsdp(accelerator: Accelerator) -> None:
    """Make the FSDP plugin, if there is one, suit a mixture; before the model is sharded.

    Under bf16 the layers compute in bf16, as accelerate has it. What passes between units keeps its precision, and
    gradients are summed over the processes in float32.

    Raises `ValueError` for the first version of FSDP.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version is {plugin.fsdp_version}; a mixture is sharded by FSDP2 only. Set fsdp_version: 2, as "
            "configs/accelerate/fsdp2.yaml does"
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Let a sharded model be saved whole for a while: under SHARDED_STATE_DICT `Trainer.save_model` writes nothing."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        yield
        return
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type("SHARDED_STATE_DICT")


@contextmanager
def policy_head_shown(model: nn.Module) -> Iterator[None]:
    """Let `model.get_output_embeddings()` be the policy's for a while.

    accelerate asks for it, beside the input embeddings, to put tied ones into one unit. At other times a mixture has
    none: TRL would take them for the head of all its logits.
    """
    if not isinstance(model, LogitMixForCausalLM):
        yield
        return
    model.get_output_embeddings = model.policy.get_output_embeddings  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.get_output_embeddings


@contextmanager
def gathered_weights(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """All weights whole on every process, gathered once; nothing is communicated inside, so processes may differ in
    how much they generate. `reshard_after_forward` is what holds afterwards. Nothing to do for a model not sharded.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    # By torch's mark `generate` knows that processes must take every forward together; by the Trainer's hooks around
    # `generate` the root is gathered before each call and let go after it.
    marks = [name for name in ("_is_fsdp_managed_module", "generate") if name in vars(model)]
    laid_aside: dict[str, Any] = {name: vars(model).pop(name) for name in marks}
    try:
        yield
    finally:
        vars(model).update(laid_aside)
        for unit in units:
            unit.reshard()
            # the root's is needed at once in backward, so that FSDP2 by default keeps it
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)
