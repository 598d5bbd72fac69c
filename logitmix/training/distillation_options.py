"""Which options a distillation reads. An option that is set and that nothing reads is refused, as in GRPO."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from logitmix.training.config_checks import validate_tools_are_given
from logitmix.training.option_readers import SHARED_READERS, Reader, validate_options_are_read
from logitmix.training.option_types import set_types
from logitmix.training.sampling_checks import set_all_tokens

READERS = (
    Reader(("decoding",), lambda args: args.lmbda < 1, "an lmbda below 1, with which the mixture samples"),
    Reader(
        ("cache_implementation",), lambda args: not args.use_vllm or args.lmbda < 1, "completions sampled by generate"
    ),
    Reader(("vllm_mode", "vllm_structured_outputs_regex"), lambda args: args.use_vllm, "use_vllm"),
    *SHARED_READERS,
)

_LOADED = "the student and the mixture are loaded before the trainer is made"
_NO_LABELS = "the loss has no labels"
_ORDER = "prompts are in random order, or as given with shuffle_dataset=False"
_LOSS_ONLY = "an evaluation computes the loss only"
NEVER_READ = {
    **dict.fromkeys(("model_init_kwargs", "teacher_model_init_kwargs", "teacher_model_revision"), _LOADED),
    "teacher_model_name_or_path": "the teacher is the mixture that is given",
    **dict.fromkeys(("label_smoothing_factor", "label_names"), _NO_LABELS),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), _ORDER),
    "data_seed": "the order of prompts is by seed",
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches"), _LOSS_ONLY),
    **dict.fromkeys(("eval_accumulation_steps", "eval_use_gather_object", "prediction_loss_only"), _LOSS_ONLY),
    "liger_kernel_config": "its fused losses know no teacher",
}

# Keys of `generation_kwargs` with which a prompt would have several completions
_ONE = ("num_return_sequences", "num_beams", "num_beam_groups", "n")
_ENDS = ("eos_token_id", "stop_strings", "stop")
_LENGTHS = ("max_new_tokens", "max_tokens")


def validate_distillation_options(args: Any, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options of a distillation that have no effect, or with which it would be another one.

    `given` are the trainer's other arguments (`tools`, …).
    """
    set_types(args)  # a script may have changed them since
    set_all_tokens(args)
    validate_options_are_read(args, READERS, NEVER_READ)
    validate_tools_are_given(args, given)
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True cannot be used: it would split the prompts of an update; lower "
            "per_device_train_batch_size, and raise gradient_accumulation_steps by as much"
        )
    for key, value in (args.generation_kwargs or {}).items():
        name = f"generation_kwargs[{key!r}]"
        if not args.use_vllm and not hasattr(GenerationConfig(), key):
            raise ValueError(f"{name} is {value!r}, which generate does not know; correct it, or leave it out")
        if key in _ONE and value not in (None, 1):
            raise ValueError(f"{name} is {value!r}, but a prompt has one completion; leave it out")
        if key in _ENDS and not args.use_vllm:
            raise ValueError(f"{name} is {value!r}, which completions do not read; set stop_strings instead")
        if key in _LENGTHS and value is not None and value > args.max_completion_length:
            raise ValueError(
                f"{name} is {value}, above max_completion_length {args.max_completion_length}, which prompts are "
                "checked with; raise max_completion_length instead"
            )
