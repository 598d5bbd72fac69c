"""Re-anchoring: every so many updates, the policy or the merged weights become the anchor of the next updates."""

from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from logitmix.mixture.merging import set_merge, validate_mergeable
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.validation import updates_per_outer_step
from logitmix.training.config import LogitMixGRPOConfig


class Reanchor(TrainerCallback):
    """Copies new weights into the anchor after every `reanchor_steps` updates, before the checkpoint of that step.

    `reanchor_to="policy"` takes those of the policy, `"merged"` `(1 - alpha) θ_policy + alpha θ_anchor`. Checkpoints
    hold the anchor whole, so that a resumed run has the anchor of its step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config, mixture = self.trainer.args, self.trainer.model
        if state.global_step % config.reanchor_steps == 0:
            (anchor,) = mixture.anchors
            set_merge(anchor, mixture.policy, anchor, mixture.alpha if config.reanchor_to == "merged" else 0.0)


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
    way_out = "leave out reanchor_steps"
    if not isinstance(model, LogitMixForCausalLM) or len(model.config.members) != 2:
        raise ValueError(f"reanchor_steps is {steps}, which needs a mixture of a policy and one anchor; {way_out}")
    obstacles = {
        "the anchor shares the policy's model, as an adapter or its base, and has no weights of its own": (
            bool(model.config.adapters)
        ),
        "the anchor's weights are quantised": bool(model.config.quantized_models),
        "save_frozen is 'never', with which checkpoints refer to the first anchor": args.save_frozen == "never",
        "use_vllm is set, and vLLM keeps the first anchor": args.use_vllm,
        "offload_anchor keeps a copy of the first anchor": args.offload_anchor,
        "FSDP or DeepSpeed shards the members": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
    }
    for obstacle, is_met in obstacles.items():
        if is_met:
            raise ValueError(f"reanchor_steps is {steps}, but {obstacle}; change that, or {way_out}")
    validate_mergeable(model.policy, model.anchors[0], way_out)
