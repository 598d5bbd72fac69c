"""Serving a saved mixture: a vLLM plug-in, and a server without vLLM.

A request's alpha passes through these files:

1. `http.py` (vLLM) or `without_vllm.py` reads `alpha`, `weights` or `member` from the HTTP request; with
   vLLM's `LLM` they are in `SamplingParams.extra_args`.
2. `requests.py` validates them and returns one weight per member.
3. `engine_v1.py` or `engine_v2.py`, for vLLM's first or second model runner, keeps the weights of each request while
   it runs. `engine.py` is their interface, and `model_state.py` the second runner's state.
4. `model.py` mixes the members' logits at these weights.

`config.py` sets up vLLM for a mixture, `alternating/` lets two members take turns, `draft.py` makes a member a draft
model, `adapters.py` runs members that are adapters of one model, and the `*_patches.py` hold what depends on internals
of vLLM and transformers.
"""

ARCHITECTURE = "LogitMixForCausalLM"


def register() -> None:
    """Register the mixture with vLLM. Its entry point `vllm.general_plugins` calls this in every process of vLLM."""
    from vllm import ModelRegistry

    import logitmix.mixture.modeling  # noqa: F401  registers the configuration with transformers
    from logitmix.mixture.configuration import LogitMixConfig
    from logitmix.serving.alternating.vllm_patches import let_members_draft_on_the_second_runner
    from logitmix.serving.config import MixtureConfigHooks
    from logitmix.serving.vllm_patches import name_bytes_of_a_token, register_config_hooks

    ModelRegistry.register_model(ARCHITECTURE, "logitmix.serving.model:LogitMixForCausalLM")
    register_config_hooks(ARCHITECTURE, MixtureConfigHooks)
    name_bytes_of_a_token(LogitMixConfig)
    let_members_draft_on_the_second_runner()
