"""What the plug-in replaces in vLLM, and the internals of vLLM that it reads.

Written against vLLM 0.32; tests/serving/test_vllm_patches.py is the contract.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from vllm import SamplingParams
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig, replace
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.metadata import SamplingMetadata

# --- configuration --------------------------------------------------------------------------------------------------


def register_config_hooks(architecture: str, hooks: type[VerifyAndUpdateConfig]) -> None:
    """Add hooks to vLLM's table of configurations, since its model registry takes none from a plug-in."""
    MODELS_CONFIG_MAP[architecture] = hooks


def uses_second_model_runner(vllm_config: VllmConfig) -> bool:
    """Whether vLLM runs the model in its second model runner; versions with one runner lack the attribute."""
    return getattr(vllm_config, "use_v2_model_runner", False)


def second_model_runner_validates_requests() -> bool:
    """Whether custom logits processors exist there, which they do since vLLM 0.31.

    Before, vLLM chooses its first runner for a model with such a processor, unless the environment demands the second.
    """
    return find_spec("vllm.v1.worker.gpu.sample.logits_processor") is not None


def declare_experts(model_config: ModelConfig, member_configs: Sequence[PreTrainedConfig]) -> None:
    """Declare the members' MoE experts for the mixture, since vLLM reads their number from the outer model only."""
    experts = [
        ModelArchConfigConvertorBase(config, config.get_text_config()).get_num_experts() or 0
        for config in member_configs
    ]
    if any(experts):
        model_config.hf_config.num_experts = max(experts)
        model_config.model_arch_config = model_config.get_model_arch_config()


def member_vllm_config(vllm_config: VllmConfig, name: str, config: PreTrainedConfig) -> VllmConfig:
    """The configuration that vLLM would build for one member served alone; vLLM derives it for whole models only."""
    config = copy.deepcopy(config)
    # otherwise members with equal configurations share one compiled artefact
    config.logitmix_member = name
    member = vllm_config.with_hf_config(config, config.architectures)
    text_config = config.get_text_config()
    member.model_config.hf_text_config = text_config
    member.model_config.model_arch_config = member.model_config.get_model_arch_config()
    cache_config = copy.copy(vllm_config.cache_config)
    # as in vLLM: where sliding windows alternate with full attention, this value would apply to every layer
    all_slide = set(getattr(text_config, "layer_types", None) or ["sliding_attention"]) == {"sliding_attention"}
    cache_config.sliding_window = member.model_config.get_sliding_window() if all_slide else None
    return replace(member, cache_config=cache_config)


def name_bytes_of_a_token(of_model: type[PreTrainedConfig]) -> None:
    """Add the bytes of KV cache per token to the error of a context that does not fit, for models of this kind.

    vLLM names the whole cache only, and several members need more than it leads to expect.
    """
    from vllm.v1.engine import core

    base_configs = core.get_kv_cache_configs
    if hasattr(base_configs, "__wrapped__"):
        return

    @wraps(base_configs)
    def configs(vllm_config: VllmConfig, kv_cache_specs: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base_configs(vllm_config, kv_cache_specs, *args, **kwargs)
        except ValueError as error:
            if not isinstance(vllm_config.model_config.hf_config, of_model):
                raise
            num_bytes = kv_bytes_per_token(kv_cache_specs[0].values())
            raise ValueError(
                f"{error} A token of context takes {num_bytes} bytes of KV cache on a device, of all members."
            ) from error

    core.get_kv_cache_configs = configs  # type: ignore[assignment]


def kv_bytes_per_token(specs: Iterable[Any]) -> int:
    """Bytes of KV cache per token over all layers; one with a sliding window needs them only within the window."""
    return sum(spec.page_size_bytes // spec.block_size for spec in specs)


# --- requests -------------------------------------------------------------------------------------------------------

BatchListener = Callable[[Any, Any, SchedulerOutput], None]
_listeners: list[BatchListener] = []


def after_batch_update(listener: BatchListener) -> None:
    """Call `listener(model, runner, step)` whenever the first model runner has updated its batch for a step.

    This runner tells only its logits processors which requests are in the batch, and refuses them under speculation.
    """
    if listener in _listeners:
        return
    if not _listeners:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        base_update = GPUModelRunner._update_states

        @wraps(base_update)
        def update(runner: Any, scheduler_output: SchedulerOutput) -> Any:
            result = base_update(runner, scheduler_output)
            for listener in _listeners:
                listener(runner.get_model(), runner, scheduler_output)
            return result

        GPUModelRunner._update_states = update
    _listeners.append(listener)


def requests_in_batch(runner: Any) -> dict[str, SamplingParams]:
    """The sampling parameters of the requests in the first model runner's batch, in the order of its rows."""
    return {name: runner.requests[name].sampling_params for name in runner.input_batch.req_ids}


def validate_sampling_parameters(
    validate: Callable[[ModelConfig, SamplingParams, SpeculativeConfig | None], None],
) -> None:
    """Also call `validate` where vLLM verifies a request, since it refuses logits processors beside speculation."""
    base_verify = SamplingParams.verify
    if getattr(base_verify, "validates_mixtures", False):
        return

    @wraps(base_verify)
    def verify(
        params: SamplingParams, model_config: ModelConfig, speculative_config: SpeculativeConfig | None, *args: Any
    ) -> None:
        base_verify(params, model_config, speculative_config, *args)
        try:
            validate(model_config, params, speculative_config)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error

    verify.validates_mixtures = True  # type: ignore[attr-defined]
    SamplingParams.verify = verify


def repair_expand_kernel() -> None:
    """Replace a kernel of vLLM's CPU build that drops its result, unless that is int64.

    With it, the temperature, top-k and top-p of speculative decoding are uninitialised memory (vLLM #55005).
    Raises `ValueError` in versions that have no such kernel to replace.
    """
    if not current_platform.is_cpu():
        return
    if find_spec("vllm.triton_utils.dispatcher") is None:
        raise ValueError("on a CPU, speculative decoding needs vLLM 0.31 or later; leave out speculative_config")
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.sample.rejection_sampler import expand_kernel

    if isinstance(expand_kernel, KernelOverride):  # otherwise it is Triton's own
        expand_kernel._impl, expand_kernel._forward_by_name = _expand, False


def _expand(
    output: Tensor, values: Tensor, ends: Tensor, replace_from: float, replace_to: float, max_num_tokens: int = 0
) -> None:
    """Write each of the values `[N]` to the output up to its end in `ends` `[N]`, with `replace_from` replaced."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    output[: int(ends[-1])] = replaced.repeat_interleave(counts).to(output.dtype)


def draw_drafts_by_seed() -> None:
    """Draw the drafts of requests with a seed by their own generators; vLLM's draft models use the global one."""
    from vllm.v1.sample.ops.topk_topp_sampler import random_sample
    from vllm.v1.spec_decode import llm_base_proposer

    base_draw = llm_base_proposer.compute_probs_and_sample_next_token
    if hasattr(base_draw, "__wrapped__"):
        return

    @wraps(base_draw)
    def draw(logits: Tensor, metadata: SamplingMetadata, *args: Any) -> tuple[Tensor, Tensor]:
        tokens_N, probs_NV = base_draw(logits, metadata, *args)
        for i, generator in metadata.generators.items():
            tokens_N[i : i + 1] = random_sample(probs_NV[i : i + 1].clone(), {0: generator})
        return tokens_N, probs_NV

    llm_base_proposer.compute_probs_and_sample_next_token = draw


def name_layers_of_drafts(vllm_config: VllmConfig) -> None:
    """Let a draft model name its `attention_layers`: vLLM finds only those that the draft adds to the target's."""
    if uses_second_model_runner(vllm_config):
        from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator as Drafter

        attribute = "draft_attn_layer_names"
    else:
        from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as Drafter  # type: ignore[assignment]

        attribute = "_draft_attn_layer_names"
    base_load = Drafter.load_model
    if hasattr(base_load, "__wrapped__"):
        return

    @wraps(base_load)
    def load_model(drafter: Any, target_model: Any) -> None:
        base_load(drafter, target_model)
        names = getattr(drafter.model, "attention_layers", None)
        if names is not None:
            setattr(drafter, attribute, set(names))

    Drafter.load_model = load_model  # type: ignore[method-assign]
    if attribute.startswith("_"):
        require_first_cache_group(Drafter)


def require_first_cache_group(drafter_class: Any) -> None:
    """Refuse drafts by layers outside the first group of the KV cache, where members' layers may be.

    The first model runner gives draft models that group's block table, so others would overwrite the cache of members.
    """
    base_initialize = drafter_class.initialize_attn_backend

    @wraps(base_initialize)
    def initialize(drafter: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        layers = set(getattr(drafter.model, "attention_layers", ()))
        if not layers <= set(kv_cache_config.kv_cache_groups[0].layer_names):
            raise ValueError(
                "the member that drafts has attention layers in more than one group of vLLM's KV cache, or not in the "
                "first, where vLLM's first model runner expects them; set draft_member to another member, name the "
                "folder of another draft model, or set VLLM_USE_V2_MODEL_RUNNER=1"
            )
        return base_initialize(drafter, kv_cache_config, *args, **kwargs)

    drafter_class.initialize_attn_backend = initialize


# --- forward pass ---------------------------------------------------------------------------------------------------


def request_starts() -> Tensor | None:
    """The index of each request's first token in the batch, then their total: `[requests + 1]`.

    vLLM does not pass it to a model. It is None while vLLM measures memory, without requests.
    """
    metadata = get_forward_context().attn_metadata
    return None if metadata is None else next(iter(metadata.values())).query_start_loc


def add_to_output(layer: LinearBase, add: Callable[[Tensor, Tensor], None]) -> None:
    """Call `add(output, input)` in place after each forward pass of a linear layer, which has no hook for it."""
    base_forward = layer.forward

    def forward(layer: LinearBase, x: Tensor) -> Any:
        output = base_forward(x)
        add(output[0] if isinstance(output, tuple) else output, x)
        return output

    layer.forward = MethodType(forward, layer)


def split_attention(attention: Attention, members: Sequence[str], config: VllmConfig) -> None:
    """Make an attention layer one layer per member, since vLLM allocates the KV cache per layer name.

    The layers differ in name only. Inputs hold the members' tokens one member after the other.
    """
    registry = config.compilation_config.static_forward_context
    layers = [attention]
    path = attention.layer_name.partition(".")[2]
    for name in members[1:]:
        layer = copy.copy(attention)
        layer.layer_name = f"{name}.{path}"
        layer.impl = copy.copy(attention.impl)
        registry[layer.layer_name] = layer
        layers.append(layer)
    base_forward = type(attention).forward

    def forward(
        self: Attention, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None, output_dtype: Any = None
    ) -> Tensor:
        K = len(layers)
        if output_shape is not None:
            output_shape = torch.Size((output_shape[0] // K, *output_shape[1:]))
        chunks = zip(layers, query.chunk(K), key.chunk(K), value.chunk(K), strict=True)
        return torch.cat([base_forward(layer, q, k, v, output_shape, output_dtype) for layer, q, k, v in chunks])

    attention.forward = MethodType(forward, attention)
