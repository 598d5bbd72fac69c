"""vLLM's configuration of a mixture: what it sets up, and what it refuses."""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.vllm_patches import choose_first_model_runner
from logitmix.serving.weights import RequestWeights

PROCESSOR = "logitmix.serving.weights:RequestWeights"
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class ServedMixture(VerifyAndUpdateConfig):
    """vLLM calls these hooks in each process once it has built the configuration of a mixture."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        config = model_config.hf_config
        validate_members(config)
        # vLLM sets up mixture-of-experts layers only if the outer model declares experts
        experts = [get_num_experts(getattr(config, name)) for name in config.model_names]
        if any(experts):
            config.num_experts = max(experts)
            model_config.model_arch_config = model_config.get_model_arch_config()
        choose_first_model_runner()
        processors = list(model_config.logits_processors or [])
        if PROCESSOR not in processors:
            model_config.logits_processors = [*processors, PROCESSOR]
        RequestWeights.served = config

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative decoding cannot be used with a mixture; leave out speculative_config")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                f"pipeline_parallel_size is {vllm_config.parallel_config.pipeline_parallel_size}; a mixture needs 1, "
                "use tensor_parallel_size"
            )


def get_num_experts(config: PreTrainedConfig) -> int:
    return ModelArchConfigConvertorBase(config, config.get_text_config()).get_num_experts() or 0


def validate_members(config: LogitMixConfig) -> None:
    """Raise `ValueError` for a member that vLLM does not support, or that has layers other than attention."""
    supported = ModelRegistry.get_supported_archs()
    for name in config.model_names:
        member = getattr(config, name)
        if not member.architectures:  # not set in a member that was never saved on its own
            member.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[member.model_type]]
        unknown = [architecture for architecture in member.architectures if architecture not in supported]
        if unknown:
            raise ValueError(
                f"the member {name} is a {unknown[0]}, which this version of vLLM does not support; install one "
                "that does, or generate with transformers"
            )
        layers = set(getattr(member.get_text_config(), "layer_types", None) or [])
        if layers - ATTENTION or not hasattr(member.get_text_config(), "num_attention_heads"):
            raise ValueError(
                f"the member {name} is a {member.model_type} with layers other than attention "
                f"({', '.join(sorted(layers - ATTENTION)) or 'it has no heads'}), which vLLM cannot run side by side; "
                "generate with transformers"
            )
