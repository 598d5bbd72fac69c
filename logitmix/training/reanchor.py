"""Re-anchoring: every so many updates, the policy or the merged weights become the anchor of the next updates."""

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitmix.mixture.adapter_sums import set_to_sum, validate_holds_sum
from logitmix.mixture.adapters import adapter_config_from_dict, add_adapter
from logitmix.mixture.configuration import NO_ADAPTER
from logitmix.mixture.merging import set_merge, validate_mergeable
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.config import LogitMixGRPOConfig, updates_per_outer_step

_WAY_OUT = "leave out reanchor_steps"


class Reanchor(TrainerCallback):
    """Copies new weights into the anchor after every `reanchor_steps` updates, before the checkpoint of that step.

    `reanchor_to="policy"` takes those of the policy, `"merged"` `(1 - alpha) θ_policy + alpha θ_anchor`. Of adapters
    on one base, the anchor's becomes the policy's. Checkpoints hold the anchor, or its adapter, so that a resumed run
    has the anchor of its step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config, mixture = self.trainer.args, self.trainer.model
        if state.global_step % config.reanchor_steps:
            return
        if _is_adapter(mixture):
            set_to_sum(mixture.policy, mixture.config.members[1], mixture.policy, {"policy": 1.0})
        else:
            (anchor,) = mixture.anchors
            set_merge(anchor, mixture.policy, anchor, mixture.alpha if config.reanchor_to == "merged" else 0.0)


def _is_adapter(mixture: LogitMixForCausalLM) -> bool:
    """Whether the anchor is an adapter on the policy's base, or this base."""
    return mixture.config.members[1] in mixture.config.adapters


def prepare_reanchor(trainer: Any) -> None:
    """Give an anchor that is the base of the policy's adapter an adapter of its own, without effect at first.

    Raises `ValueError` as `validate_reanchor`, and where the anchor's adapter cannot hold the policy's.
    """
    validate_reanchor(trainer)
    mixture = trainer.model
    if not _is_adapter(mixture):
        return
    name, config = mixture.config.members[1], mixture.config
    if config.adapters[name] == NO_ADAPTER:
        adapter = adapter_config_from_dict(config.adapters["policy"])
        adapter.init_lora_weights = True
        with torch.random.fork_rng():
            config.adapters[name] = add_adapter(mixture.policy, name, adapter)
        mixture.attach({"policy": mixture.policy})
    try:
        validate_holds_sum(mixture.policy, name, mixture.policy, {"policy": 1.0})
    except ValueError as error:
        raise ValueError(
            f"reanchor_steps is {trainer.args.reanchor_steps}, but the anchor's adapter cannot take the policy's "
            f"weights: {error}; {_WAY_OUT}, or give the policy an adapter with the anchor's configuration"
        ) from error


def validate_reanchor(trainer: Any) -> None:
    """Raise `ValueError` where the anchor cannot take the policy's weights, or its place in a checkpoint."""
    args: LogitMixGRPOConfig = trainer.args
    model: PreTrainedModel = trainer.model
    steps, outer = args.reanchor_steps, updates_per_outer_step(args)
    assert steps is not None
    if steps < 1 or steps % outer:
        raise ValueError(
            f"reanchor_steps is {steps}, and an outer step has {outer} updates; the anchor may change only between "
            f"outer steps: use a multiple of {outer}"
        )
    if not isinstance(model, LogitMixForCausalLM) or len(model.config.members) != 2:
        raise ValueError(f"reanchor_steps is {steps}, which needs a mixture of a policy and one anchor; {_WAY_OUT}")
    is_adapter = _is_adapter(model)
    obstacles = {
        "the anchor is the policy's own model": bool(model.config.anchors_that_are_the_policy),
        "the policy is an adapter, and the anchor a model of its own": "policy" in model.config.adapters
        and not is_adapter,
        "reanchor_to is 'merged', and merged adapters have the rank of both together": is_adapter
        and args.reanchor_to == "merged",
        "the anchor's weights are quantised": bool(model.config.quantized_models) and not is_adapter,
        "save_frozen is 'never', with which checkpoints refer to the first anchor": args.save_frozen == "never"
        and not is_adapter,
        "use_vllm is set, and vLLM keeps the first anchor": args.use_vllm,
        "offload_anchor keeps a copy of the first anchor": args.offload_anchor,
        "FSDP or DeepSpeed shards the members": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
    }
    for obstacle, is_met in obstacles.items():
        if is_met:
            raise ValueError(f"reanchor_steps is {steps}, but {obstacle}; change that, or {_WAY_OUT}")
    if not is_adapter:
        validate_mergeable(model.policy, model.anchors[0], _WAY_OUT)
