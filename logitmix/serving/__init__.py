"""The mixture in vLLM, a plug-in with which vLLM takes a saved mixture as any model; and a server without vLLM."""


def register() -> None:
    """Register the mixture with vLLM, by its entry point `vllm.general_plugins`: in every process that vLLM starts."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import logitmix.mixture.modeling  # noqa: F401  registers the configuration with transformers
    from logitmix.serving.config import ServedMixture

    ModelRegistry.register_model("LogitMixForCausalLM", "logitmix.serving.model:LogitMixForCausalLM")
    MODELS_CONFIG_MAP["LogitMixForCausalLM"] = ServedMixture
