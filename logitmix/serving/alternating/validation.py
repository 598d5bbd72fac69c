"""What alternating decoding in vLLM needs of the engine's configuration and of a request."""

from vllm import SamplingParams
from vllm.config import CUDAGraphMode, VllmConfig

from logitmix.serving.alternating import PROPOSER, SCHEDULER, WORKER


def is_alternating(speculative_config: object) -> bool:
    """Whether the drafts come from members that take turns."""
    return getattr(speculative_config, "model", None) == PROPOSER


def validate_alternating(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for a configuration in which two members cannot take turns, or that is incomplete."""
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    parts = {
        "speculative_config": is_alternating(vllm_config.speculative_config),
        "worker_cls": parallel.worker_cls == WORKER,
        "scheduler_cls": scheduling.scheduler_cls == SCHEDULER,
    }
    if not any(parts.values()):
        return
    if not all(parts.values()):
        missing = ", ".join(name for name, is_set in parts.items() if not is_set)
        raise ValueError(f"{missing} is not that of alternating decoding; pass all of alternating_decoding()")
    reason = _reason_against(vllm_config)
    if reason is not None:
        raise ValueError(f"alternating decoding does not run with {reason}; change that, or decode jointly")
    if vllm_config.compilation_config.cudagraph_mode is None and not vllm_config.model_config.enforce_eager:
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE  # vLLM's default has full graphs


def _reason_against(vllm_config: VllmConfig) -> str | None:
    """What excludes alternating decoding, as the end of "does not run with", or None."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    if len(config.members) != 2:
        return f"{len(config.members)} members, but with two"
    if len(config.model_names) != 2:
        return "members that are adapters of one model, which run in one pass"
    if speculative is not None and speculative.num_speculative_tokens != 1:
        return f"num_speculative_tokens {speculative.num_speculative_tokens}, but with 1"
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(parallel, name) > 1:
            return f"{name} {getattr(parallel, name)}, but with 1"
    if vllm_config.scheduler_config.async_scheduling:
        return "async_scheduling"
    # blocks would be stored elsewhere before the other member has written them
    for owner, name in ((vllm_config, "kv_transfer_config"), (vllm_config.cache_config, "kv_offloading_size")):
        if getattr(owner, name, None) is not None:
            return name
    # a graph of a whole step is that of one member, and vLLM would replay it for the other
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        return f"cudagraph_mode {mode.name}, but with PIECEWISE or NONE"
    return None


def validate_alternating_request(params: SamplingParams) -> None:
    """Raise `ValueError` for a request whose drafts another part of vLLM would change or count.

    A grammar drops a draft by its value, after which verifying the others is not exact. vLLM returns the
    log-probabilities of `logprob_token_ids` only where it verifies no draft.
    """
    for name in ("structured_outputs", "thinking_token_budget", "logprob_token_ids"):
        if getattr(params, name, None) is not None:
            raise ValueError(f"{name} is set, which alternating decoding does not support; serve with joint decoding")
