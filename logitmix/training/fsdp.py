"""A mixture under FSDP2: the three points that accelerate and TRL's trainer do not cover.

They shard the decoder layers of all members, anchors included, one unit a layer. What is left (embeddings, norms,
heads) is the root's unit. A mixture needs a change in three places:

- accelerate's bf16 policy casts what the root takes and returns, and so weights per sequence and log-probabilities;
- the policy's tied embeddings would be one matrix in two units, since a mixture has no output embeddings to report;
- `generate` would gather each layer again for every token.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from transformers import Trainer

from logitmix.mixture.modeling import LogitMixForCausalLM


def prepare_fsdp(trainer: Trainer) -> None:
    """Configure FSDP, if it is on, for the trainer's model, before the model is sharded.

    Raises `ValueError` for a mixture under the first version of FSDP.
    """
    if isinstance(trainer.model, LogitMixForCausalLM):
        configure_plugin(trainer.accelerator)
    if trainer.is_fsdp_enabled:
        # Otherwise each process would hold the whole gradients of all micro-batches of an update but the last
        given = trainer.args.accelerator_config.gradient_accumulation_kwargs or {}
        trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = given.get("sync_each_batch", True)


def configure_plugin(accelerator: Accelerator) -> None:
    """Make the FSDP plugin, if there is one, suit a mixture.

    Under bf16 the layers compute in bf16, as accelerate sets it. What passes between units keeps its precision, and
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
    """Save a sharded model whole within the context: with SHARDED_STATE_DICT `Trainer.save_model` writes nothing."""
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
def policy_head_exposed(model: nn.Module) -> Iterator[None]:
    """Return the policy's head from `model.get_output_embeddings()` within the context.

    accelerate asks for it, beside the input embeddings, to put tied ones into one unit. Outside the context a mixture
    has none: TRL would take it for the head of the mixture's logits.
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
    """Hold all weights whole on every process within the context.

    They are gathered once. Nothing is communicated inside, so each process may generate as much as it likes.
    `reshard_after_forward` is the setting restored afterwards. Does nothing for a model that is not sharded.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # FSDP2 keeps the root's weights by default, since backward needs them at once
            unit.set_reshard_after_forward(reshard_after_forward and unit is not model, recurse=False)
