"""Checks of a training run's options before anything is sampled. `data_checks.py` checks its data."""

from collections.abc import Mapping
from typing import Any, get_args

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl.import_utils import is_vllm_available

from logitmix.mixture.adapters import CHANGES_BASE
from logitmix.mixture.decoding.loop import Decoding, validate_decoding
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import as_quantization
from logitmix.training.alpha.controllers import CONTROLLERS
from logitmix.training.config import (
    GROUP_LOSS,
    AnchorStatesOption,
    DynamicSampling,
    LogitMixGRPOConfig,
    LossHead,
    ReanchorTo,
    SaveFrozen,
    TrainTarget,
)
from logitmix.training.option_readers import validate_options_are_read
from logitmix.training.option_types import set_types
from logitmix.training.resumable_config import validate_max_steps
from logitmix.training.sampling_checks import (
    set_all_tokens,
    validate_sampling_is_scored,
    validate_score_truncated,
)

LOSS_TYPES_OF_TRL = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def validate_config(args: LogitMixGRPOConfig, model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that cannot work, contradict each other, or do not suit the model.

    `given` are the trainer's other arguments (`eval_dataset`, `peft_config`, `tools`, …).
    """
    if is_peft_model(model) and isinstance(model.get_base_model(), LogitMixForCausalLM):
        raise ValueError(
            "the model is a mixture that PEFT has wrapped; TRL would not see it. Build it with "
            "LogitMixForCausalLM.from_members(…, peft_config=…) instead of get_peft_model"
        )
    validate_options(args)
    if args.use_vllm and not is_vllm_available():
        raise ValueError("use_vllm is set, but vLLM is not installed: pip install vllm, or leave out use_vllm")
    validate_evaluation(args, given.get("eval_dataset"))
    validate_kl(args, model)
    validate_train_target(args, model)
    if isinstance(model, LogitMixForCausalLM):
        model.config.require_one_prompt("training")
        validate_plausibility(model)
    validate_adapter(args, model, given.get("peft_config"))
    if given.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config is given, but the trainer loads members without it; load the quantised model with "
            "from_pretrained, and pass it as the model"
        )
    validate_tools_are_given(args, given)
    validate_decoding(model, args.decoding)
    validate_score_truncated(args, isinstance(model, LogitMixForCausalLM), given)
    if isinstance(model, LogitMixForCausalLM):
        validate_mixture(args, model)


def validate_mixture(args: LogitMixGRPOConfig, model: LogitMixForCausalLM) -> None:
    """Raise `ValueError` for options of a single model, and for a mixture whose policy cannot train, or not alone."""
    for option, reason in {
        "use_liger_kernel": "its fused loss reads one model's hidden states",
        "cast_lm_head_to_fp32": "a mixture has no single head; its logits are mixed in float32 anyway",
        "use_transformers_continuous_batching": "its paged cache does not support several members",
        "sync_ref_model": "there is no reference model beside the anchor",
    }.items():
        if getattr(args, option):
            raise ValueError(f"{option}={getattr(args, option)!r} cannot be used with a mixture: {reason}")
    if model.config.anchors_that_are_the_policy:
        raise ValueError(
            f"{model.config.anchors_that_are_the_policy[0]} is the policy's own model, so it would train with it; "
            "give the anchor as a folder, or copy.deepcopy(model)"
        )
    if "policy" in model.config.quantized_models and "policy" not in model.config.adapters:
        raise ValueError(
            "the policy has quantised weights, which cannot train; quantise the anchor alone (anchor_quantization), "
            "or train an adapter (peft_config)"
        )
    if model.config.weights[0] <= 0:
        raise ValueError(
            f"the policy's weight in the mixture is {model.config.weights[0]}; it is a factor of the gradient, so "
            "training needs it above 0"
        )


def validate_options(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for options that are wrong whatever the model is."""
    set_types(args)  # a script may have changed them since
    set_all_tokens(args)
    if args.loss_type == GROUP_LOSS and args.beta != 0:
        raise ValueError(
            f"beta is {args.beta} with loss_type 'group', whose objective (eq. 6) has no KL term; "
            "set beta=0, or loss_type='grpo' for canonical GRPO with KL"
        )
    if args.stop_strings and args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions would mask every completion that ended in a stop string, since TRL counts it "
            "as truncated; set it to False, or leave out stop_strings"
        )
    if args.stop_strings and args.use_transformers_continuous_batching:
        raise ValueError(
            f"stop_strings is {args.stop_strings}, which use_transformers_continuous_batching does not read; leave "
            "out one of them"
        )
    validate_choices(args)
    validate_numbers(args)
    validate_options_are_read(args)
    if args.anchor_quantization is not None:
        as_quantization(args.anchor_quantization)
    validate_sampling_is_scored(args)
    validate_sampling(args)


def validate_evaluation(args: LogitMixGRPOConfig, eval_dataset: Any) -> None:
    """Raise `ValueError` where batches of an evaluation would hold parts of a question's completions."""
    if eval_dataset is None and args.num_generations_eval is None:
        return
    batch, num_generations = args.per_device_eval_batch_size * args.world_size, args.num_generations_eval
    num_generations = num_generations or args.num_generations
    if batch % num_generations:
        raise ValueError(
            f"per_device_eval_batch_size times processes is {batch}, which the {num_generations} completions of a "
            "question in an evaluation do not divide; set num_generations_eval to a divisor of it, or change "
            "per_device_eval_batch_size"
        )


def validate_adapter(args: LogitMixGRPOConfig, model: PreTrainedModel, peft_config: Any) -> None:
    """Raise `ValueError` where nothing would train, or the KL's reference would not be the model at the start."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no weights that train; load a trained adapter with PeftModel.from_pretrained(…, "
            "is_trainable=True), or pass its folder as the model"
        )
    if isinstance(model, LogitMixForCausalLM):
        return
    if args.sync_ref_model and (peft_config is not None or is_peft_model(model)):
        raise ValueError(
            "sync_ref_model is set, but with an adapter the reference of the KL shares the base and is not updated; "
            "leave out sync_ref_model, or merge the adapter first"
        )
    if args.beta == 0:
        return
    if is_peft_model(model) and "default" not in model.peft_config:
        raise ValueError(
            f"the adapter is named {model.active_adapter!r}, and beta is {args.beta}; the reference of the KL copies "
            "the adapter named 'default': load it under that name"
        )
    start = getattr(peft_config, "init_lora_weights", True)
    if start is False or (isinstance(start, str) and start.lower().startswith(CHANGES_BASE)):
        raise ValueError(
            f"init_lora_weights is {start!r}, with which the adapter starts away from its base, and beta is "
            f"{args.beta}, whose reference is the base; set init_lora_weights=True, or pass get_peft_model(…) as the "
            "model, whose reference is a copy of the adapter"
        )


def validate_tools_are_given(args: Any, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a limit on tool calls without tools."""
    if args.max_tool_calling_iterations is not None and not any(
        given.get(name) for name in ("tools", "environment_factory", "rollout_func")
    ):
        raise ValueError(
            f"max_tool_calling_iterations is {args.max_tool_calling_iterations}, but nothing would read it: there are "
            "no tools; pass tools or an environment_factory, or leave it out"
        )


def validate_choices(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for an option that is none of its choices."""
    for name, choices in (
        ("alpha_controller", CONTROLLERS),
        ("loss_head", get_args(LossHead)),
        ("anchor_states", get_args(AnchorStatesOption)),
        ("save_frozen", get_args(SaveFrozen)),
        ("train_target", get_args(TrainTarget)),
        ("reanchor_to", get_args(ReanchorTo)),
        ("decoding", get_args(Decoding)),
        ("dynamic_sampling", get_args(DynamicSampling)),
        ("loss_type", (GROUP_LOSS, *LOSS_TYPES_OF_TRL)),
    ):
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} is {getattr(args, name)!r}; it must be one of {', '.join(map(repr, choices))}")


def validate_numbers(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for a number outside its range."""
    validate_max_steps(args)
    for name in ("epsilon", "epsilon_high", "beta"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")


def validate_kl(args: LogitMixGRPOConfig, model: PreTrainedModel) -> None:
    """Raise `ValueError` where `beta` and `kl_to` do not say which KL is meant."""
    is_mixture = isinstance(model, LogitMixForCausalLM)
    if args.kl_to not in (None, "anchor"):
        raise ValueError(f"kl_to is {args.kl_to!r}; it must be 'anchor', or left out")
    if args.kl_to is not None and args.beta == 0:
        raise ValueError(f"kl_to is {args.kl_to!r}, but beta is 0 and there is no KL; set beta, or leave out kl_to")
    if args.kl_to is not None and not (is_mixture and len(model.members) == 2):
        raise ValueError(
            f"kl_to is {args.kl_to!r}, and the model has {len(model.members) - 1 if is_mixture else 'no'} anchors; it "
            "needs a mixture with one. Without an anchor the KL of beta is to a copy of the initial model"
        )
    if is_mixture and args.beta != 0 and args.kl_to is None:
        raise ValueError(
            f"beta={args.beta} with a mixture does not say which anchor its KL is to: kl_to='anchor' is the frozen "
            "anchor; TRL's own reference, a copy of the initial model, would be the initial mixture, which is not "
            "kept. Set kl_to='anchor', or beta=0 as in the paper, where the anchor already holds the policy"
        )


def validate_plausibility(model: LogitMixForCausalLM) -> None:
    """Raise `ValueError` for a cut by the policy, which training moves: a sampled token may become impossible."""
    if model.config.cut is not None and model.config.plausibility_member == "policy":
        raise ValueError(
            f"the mixture has plausibility {model.config.plausibility} of the policy, which training moves, so that "
            "sampled tokens may become impossible; name a frozen member, or use config.set_plausibility(None)"
        )


def validate_train_target(args: LogitMixGRPOConfig, model: PreTrainedModel) -> None:
    """Raise `ValueError` where the policy alone would be trained with wrong importance weights, or without any."""
    if args.train_target == "mixture":
        return
    obstacles = {
        "the model has no anchor and is the policy already; set anchor": not isinstance(model, LogitMixForCausalLM),
        "score_truncated is set, and sampling leaves out tokens of the policy; sample all": args.score_truncated,
        f"beta is {args.beta}, whose KL is estimated on tokens of the policy itself; set use_bias_correction_kl": (
            args.beta != 0 and not args.use_bias_correction_kl
        ),
    }
    for obstacle, is_met in obstacles.items():
        if is_met:
            raise ValueError(f"train_target is 'policy', but {obstacle}, or set train_target='mixture'")


def validate_sampling(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for options of rollouts and dynamic sampling that do not go together."""
    if args.rollout_batch_size is not None and args.rollout_batch_size < 1:
        raise ValueError(
            f"rollout_batch_size is {args.rollout_batch_size}, but must be at least 1; leave it out to sample all "
            "rollouts of an outer step at a time"
        )
    if args.dynamic_sampling == "off":
        return
    if args.loss_type != GROUP_LOSS:
        raise ValueError(
            f"dynamic_sampling is {args.dynamic_sampling!r} with loss_type {args.loss_type!r}, which has no mean over "
            "questions to drop one from; set loss_type='group', or dynamic_sampling='off'"
        )
    if args.dynamic_sampling == "refill":
        if args.max_refills < 1:
            raise ValueError(f"max_refills is {args.max_refills}; it must be at least 1")
        if args.scale_rewards == "batch" or args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "dynamic_sampling='refill' combines groups from several samplings, whose advantages must not depend "
                "on the rest of their batch; set scale_rewards to 'group' or 'none', and "
                "multi_objective_aggregation to 'sum_then_normalize'"
            )
