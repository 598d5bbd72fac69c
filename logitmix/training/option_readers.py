"""Which options are read only together with others. An option that is set and that nothing reads is refused.

The tables are those of GRPO, and of what it shares with a distillation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from logitmix.training.alpha.controllers import VALIDATING
from logitmix.training.config import GROUP_LOSS
from logitmix.training.sampling_checks import truncates

_CLIPPED = (GROUP_LOSS, "grpo", "bnpo", "dr_grpo", "dapo", "luspo")


class Reader(NamedTuple):
    """Options, whether a configuration reads them, and the setting with which it does."""

    options: tuple[str, ...]
    is_read: Callable[[Any], bool]
    setting: str


def _by_generate(args: Any) -> bool:
    return not args.use_vllm and not args.use_transformers_continuous_batching


def _evaluates(args: Any) -> bool:
    return bool(args.eval_strategy != "no")


# Of options that the trainers of GRPO and of a distillation have in common
SHARED_READERS = (
    Reader(("log_unique_prompts", "num_completions_to_print"), lambda args: args.log_completions, "log_completions"),
    Reader(("gradient_checkpointing_kwargs",), lambda args: args.gradient_checkpointing, "gradient_checkpointing"),
    Reader(
        (
            *("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
            "vllm_tensor_parallel_size",
        ),
        lambda args: args.use_vllm and args.vllm_mode == "colocate",
        "use_vllm and vllm_mode 'colocate'",
    ),
    Reader(
        (
            *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
            "vllm_group_port",
        ),
        lambda args: args.use_vllm and args.vllm_mode == "server",
        "use_vllm and vllm_mode 'server'",
    ),
    Reader(("eval_delay", "load_best_model_at_end"), _evaluates, "an eval_strategy"),
    Reader(("eval_steps",), _evaluates, "eval_strategy 'steps'"),
    Reader(
        ("metric_for_best_model", "greater_is_better"),
        lambda args: (
            args.load_best_model_at_end
            or args.save_strategy == "best"
            or args.lr_scheduler_type == "reduce_lr_on_plateau"
        ),
        "save_strategy 'best' or load_best_model_at_end",
    ),
    Reader(
        ("optim_target_modules",),
        lambda args: any(name in str(args.optim) for name in ("galore", "apollo")),
        "an optim of GaLore or APOLLO",
    ),
)

READERS = (
    Reader(("anchor_dtype", "anchor_quantization"), lambda args: args.anchor is not None, "anchor"),
    Reader(
        ("adaptive_offset", "adaptive_scale"),
        lambda args: args.alpha_controller == "adaptive",
        "alpha_controller 'adaptive'",
    ),
    Reader(
        ("validation_size",),
        lambda args: args.alpha_controller in VALIDATING,
        "alpha_controller 'adaptive' or 'validation_weighted'",
    ),
    Reader(("max_refills",), lambda args: args.dynamic_sampling == "refill", "dynamic_sampling 'refill'"),
    Reader(("reanchor_to",), lambda args: args.reanchor_steps is not None, "reanchor_steps"),
    Reader(("score_truncated",), truncates, "top_k, top_p or min_p"),
    Reader(("anchor_states",), lambda args: args.loss_head == "fused", "loss_head 'fused'"),
    Reader(("rollout_batch_size", "cache_implementation"), _by_generate, "rollouts by generate"),
    Reader(
        ("decoding",),
        lambda args: _by_generate(args) or (args.use_vllm and args.vllm_mode == "colocate"),
        "rollouts by generate, or use_vllm and vllm_mode 'colocate'",
    ),
    Reader(
        ("epsilon",),
        lambda args: args.loss_type in _CLIPPED or (args.loss_type == "cispo" and args.epsilon_high is None),
        "a loss_type that clips",
    ),
    Reader(("epsilon_high",), lambda args: args.loss_type in (*_CLIPPED, "cispo"), "a loss_type that clips"),
    Reader(("delta",), lambda args: args.loss_type in _CLIPPED, "a loss_type that clips on both sides"),
    Reader(
        ("sapo_temperature_neg", "sapo_temperature_pos"), lambda args: args.loss_type == "sapo", "loss_type 'sapo'"
    ),
    Reader(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        lambda args: args.loss_type == "vespo",
        "loss_type 'vespo'",
    ),
    Reader(("use_bias_correction_kl",), lambda args: args.beta != 0, "beta"),
    Reader(("ref_model_mixup_alpha", "ref_model_sync_steps"), lambda args: args.sync_ref_model, "sync_ref_model"),
    Reader(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        lambda args: args.use_adaptive_entropy,
        "use_adaptive_entropy",
    ),
    Reader(("liger_kernel_config",), lambda args: args.use_liger_kernel, "use_liger_kernel"),
    Reader(
        ("transformers_continuous_batching_config",),
        lambda args: args.use_transformers_continuous_batching,
        "use_transformers_continuous_batching",
    ),
    Reader(("vllm_mode", "vllm_importance_sampling_correction"), lambda args: args.use_vllm, "use_vllm"),
    Reader(
        (
            *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
            *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"),
        ),
        lambda args: args.use_vllm and args.vllm_importance_sampling_correction,
        "use_vllm and vllm_importance_sampling_correction",
    ),
    *SHARED_READERS,
)

# Options of transformers' Trainer that GRPO does not use, each with what to do instead
NEVER_READ = {
    "label_smoothing_factor": "GRPO's loss has no labels",
    "label_names": "GRPO's loss has no labels",
    "train_sampling_strategy": "questions are in random order, or as given with shuffle_dataset=False",
    "length_column_name": "questions are in random order, or as given with shuffle_dataset=False",
    "data_seed": "the order of questions is by seed",
    "include_for_metrics": "an evaluation computes rewards only",
    "batch_eval_metrics": "an evaluation computes rewards only",
    "eval_do_concat_batches": "an evaluation computes rewards only",
    "eval_accumulation_steps": "an evaluation computes rewards only",
    "eval_use_gather_object": "an evaluation computes rewards only",
    "prediction_loss_only": "an evaluation computes rewards only",
}


def validate_options_are_read(
    args: Any, readers: Sequence[Reader] = READERS, never_read: Mapping[str, str] = NEVER_READ
) -> None:
    """Raise `ValueError` for an option that is set and has no effect with the other options.

    `readers` and `never_read` are the tables of the configuration that `args` is, by default GRPO's.
    """
    for option, reason in never_read.items():
        if _is_set(args, option):
            raise ValueError(
                f"{option} is {getattr(args, option)!r}, but nothing would read it: {reason}; leave it out"
            )
    for reader in readers:
        for option in reader.options:
            if _is_set(args, option) and not reader.is_read(args):
                raise ValueError(
                    f"{option} is {getattr(args, option)!r}, but nothing would read it: it goes with "
                    f"{reader.setting}; set that, or leave {option} at {_defaults(args)[option]!r}"
                )
    if args.save_strategy == "best" and not _evaluates(args):
        raise ValueError(
            "save_strategy is 'best', but eval_strategy is 'no', so no checkpoint would be saved; set save_strategy "
            "to 'steps', or in a script an eval_strategy"
        )


def _is_set(args: Any, option: str) -> bool:
    return bool(getattr(args, option) != _defaults(args)[option])


def _defaults(args: Any) -> Mapping[str, Any]:
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(args)
    }
