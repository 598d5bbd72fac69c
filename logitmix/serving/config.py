"""vLLM's configuration of a mixture: what it sets up, and what it rejects."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry, SamplingParams
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.alpha_range import validate_alpha_range
from logitmix.serving.alternating.validation import is_alternating, validate_alternating, validate_alternating_request
from logitmix.serving.draft import draft_member, is_same_folder
from logitmix.serving.engine import Engine
from logitmix.serving.requests import parse_request_weights
from logitmix.serving.vllm_patches import (
    declare_experts,
    second_model_runner_validates_requests,
    uses_second_model_runner,
    validate_sampling_parameters,
)

SPECULATIVE_METHODS = ("draft_model", "ngram", "suffix")
ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class MixtureConfigHooks(VerifyAndUpdateConfig):
    """vLLM calls these hooks in each process once it has built the configuration of a mixture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        validate_overrides(config)
        validate_use(model_config)
        validate_members(config)
        declare_experts(model_config, [getattr(config, name) for name in config.model_names])

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        validate_alternating(vllm_config)
        validate_speculation(vllm_config)
        model_config = vllm_config.model_config
        engine = engine_class(vllm_config)
        takes_validator = engine.validates_beside_speculation or vllm_config.speculative_config is None
        if takes_validator:
            validator = engine.request_validator.of(model_config.hf_config)
            model_config.logits_processors = [*(model_config.logits_processors or []), validator]
        if not takes_validator or is_alternating(vllm_config.speculative_config):
            validate_sampling_parameters(validate_request)
        if uses_second_model_runner(vllm_config) and not second_model_runner_validates_requests():
            raise ValueError(
                "VLLM_USE_V2_MODEL_RUNNER chooses vLLM's second model runner, but a mixture runs there only in vLLM "
                "0.31 or later; unset it, or install a later vLLM"
            )
        validate_parallelism(vllm_config)


def validate_overrides(config: LogitMixConfig) -> None:
    """Raise `ValueError` for invalid values of a mixture's configuration: vLLM sets its `hf_overrides` unchecked."""
    if hasattr(config, "alpha"):
        raise ValueError(
            f"hf_overrides sets alpha to {config.alpha!r}, which the configuration of a mixture does not have; set "
            "weights, one number per member"
        )
    config.set_weights(config.weights)
    config.set_plausibility(config.plausibility, config.plausibility_member)
    alpha_range = getattr(config, "alpha_range", None)
    if alpha_range is not None:
        validate_alpha_range(alpha_range)


def validate_use(model_config: ModelConfig) -> None:
    """Raise `ValueError` for what vLLM does with models that a mixture cannot do."""
    if model_config.runner_type == "pooling":
        raise ValueError(
            "the runner is 'pooling', but a mixture has no hidden states to pool, only logits; leave out runner and "
            "convert, or serve one of its members"
        )
    if model_config.enable_prompt_embeds:
        raise ValueError(
            "enable_prompt_embeds is set, but each member of a mixture embeds tokens itself; leave it out"
        )


def validate_speculation(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for a method of speculative decoding whose drafts need the target's own hidden states.

    Also raise it for a member that cannot draft for its mixture, and for a `draft_member` without a draft model.
    """
    speculative_config = vllm_config.speculative_config
    # vLLM calls this again for the draft model
    model_config = vllm_config.model_config if speculative_config is None else speculative_config.target_model_config
    config, folder = model_config.hf_config, model_config.model
    if speculative_config is not None and is_same_folder(str(speculative_config.model), folder):
        draft_member(config)
    elif hasattr(config, "draft_member"):
        raise ValueError(
            f"draft_member is {config.draft_member!r}, but the draft model is not the mixture; set it to {folder} in "
            "speculative_config, or leave out draft_member"
        )
    if speculative_config is None or is_alternating(speculative_config):
        return
    if speculative_config.method not in SPECULATIVE_METHODS:
        raise ValueError(
            f"the speculative method {speculative_config.method!r} is not supported for a mixture; use one of "
            f"{', '.join(SPECULATIVE_METHODS)}, or leave out speculative_config"
        )


def validate_request(
    model_config: ModelConfig, params: SamplingParams, speculative_config: SpeculativeConfig | None
) -> None:
    """Raise `ValueError` for a request to a mixture whose weights are invalid, or that its decoding cannot take."""
    if isinstance(model_config.hf_config, LogitMixConfig):
        parse_request_weights(model_config.hf_config, params.extra_args)
        if is_alternating(speculative_config):
            validate_alternating_request(params)


def validate_parallelism(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for a way to split the model or its batches in which the mixture does not run."""
    parallel_config = vllm_config.parallel_config
    pipeline_parallel_size = parallel_config.pipeline_parallel_size
    if pipeline_parallel_size > 1:
        raise ValueError(
            f"pipeline_parallel_size is {pipeline_parallel_size}, but must be 1 for a mixture; use "
            "tensor_parallel_size"
        )
    # the model runners do not split the requests' weights together with their tokens
    if parallel_config.use_ubatching:
        raise ValueError("enable_dbo is set, but a mixture cannot run two batches at once; leave it out")
    if not uses_second_model_runner(vllm_config):
        return
    prefill_context_parallel_size = getattr(parallel_config, "prefill_context_parallel_size", 1)
    if prefill_context_parallel_size > 1:
        raise ValueError(
            f"prefill_context_parallel_size is {prefill_context_parallel_size}, but must be 1 for a mixture; use "
            "tensor_parallel_size"
        )


def engine_class(vllm_config: VllmConfig) -> type[Engine]:
    """The implementation for the model runner that vLLM uses with this configuration."""
    if uses_second_model_runner(vllm_config) and second_model_runner_validates_requests():
        from logitmix.serving.engine_v2 import SecondRunnerEngine

        return SecondRunnerEngine
    from logitmix.serving.engine_v1 import FirstRunnerEngine

    return FirstRunnerEngine


def validate_members(config: LogitMixConfig) -> None:
    """Raise `ValueError` for a member that vLLM does not support, or that has layers other than attention.

    Also raise it for members that are one model: only their prompts differ, and vLLM gives all members the same one.
    """
    config.require_one_prompt("vLLM")
    if config.anchors_that_are_the_policy:
        raise ValueError(
            f"the members policy and {config.anchors_that_are_the_policy[0]} are one model and differ only in their "
            "prompts, but vLLM gives all members the same; generate with transformers, or serve the model alone"
        )
    supported = ModelRegistry.get_supported_archs()
    for name in config.model_names:
        member = getattr(config, name)
        if not member.architectures:  # not set in a member that was never saved on its own
            member.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[member.model_type]]
        unsupported = [architecture for architecture in member.architectures if architecture not in supported]
        if unsupported:
            raise ValueError(
                f"the member {name} is a {unsupported[0]}, which this version of vLLM does not support; install one "
                "that does, or generate with transformers"
            )
        text_config = member.get_text_config()
        other_layers = set(getattr(text_config, "layer_types", None) or []) - ATTENTION_LAYER_TYPES
        if other_layers or not hasattr(text_config, "num_attention_heads"):
            raise ValueError(
                f"the member {name} is a {member.model_type} with layers other than attention "
                f"({', '.join(sorted(other_layers)) or 'it has no heads'}), which vLLM cannot run side by side; "
                "generate with transformers"
            )
