"""A plug-in with which vLLM serves a saved mixture like any model, and a server without vLLM."""


def register() -> None:
    """Register the mixture with vLLM. Its entry point `vllm.general_plugins` calls this in every process of vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import logitmix.mixture.modeling  # noqa: F401  registers the configuration with transformers
    from logitmix.serving.config import ServedMixture

    ModelRegistry.register_model("LogitMixForCausalLM", "logitmix.serving.model:LogitMixForCausalLM")
    MODELS_CONFIG_MAP["LogitMixForCausalLM"] = ServedMixture
