"""The mixture as a vLLM model.

Shape legend: N tokens, D width of a member's hidden states, V vocabulary, K members.

Each member is built by vLLM under its own prefix, so that its attention layers, its share of the KV cache and its
weights have their own names. `forward` runs the members on the same tokens and returns their hidden states side by
side; `compute_logits` takes them apart, projects each with its member's head, and mixes.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from logitmix.mixture.mixing import mix_logits
from logitmix.serving.adapters import SharedModel
from logitmix.serving.weights import RequestWeights

logger = init_logger("vllm.logitmix")

# A token's row of the batch travels beside its hidden states, in two columns: bfloat16 counts exactly to 256 only.
# Eight columns, so that rows of hidden states stay aligned.
ROW_BASE, ROW_COLUMNS = 128, 8


class LogitMixForCausalLM(nn.Module):
    """`z_mix = sum_k w_k z_k` over members that vLLM knows (arXiv 2605.20555, eq. 1)."""

    policy: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.vocab_size = self.config.vocab_size
        self.shared: dict[str, SharedModel] = {}
        for name in self.config.model_names:
            config = member_vllm_config(vllm_config, name, getattr(self.config, name))
            with set_model_tag(name):
                model = initialize_model(config, prefix=maybe_prefix(prefix, name))
            self.add_module(name, model)
            members = [member for member in self.config.members if self.config.model_of(member) == name]
            adapters = self.config.adapters if name == "policy" else {}
            self.shared[name] = SharedModel(model, members, adapters, vllm_config)
        text_configs = [
            getattr(self.config, self.config.model_of(name)).get_text_config() for name in self.config.members
        ]
        self.widths = [config.hidden_size for config in text_configs]
        # where all share one head and it is linear, the hidden states are mixed, and projected once
        self.one_head = (
            len(self.config.model_names) == 1 and self.config.scheme == "logit" and _has_linear_head(self.policy)
        )
        self.instance_id = vllm_config.instance_id
        # where the context does not fit, vLLM says how much of it would
        logger.info("A token of context takes %d bytes of KV cache, of all members.", kv_bytes_per_token(vllm_config))

    @property
    def members(self) -> list[Any]:
        """The models that run the members, in the order of the weights."""
        return [getattr(self, self.config.model_of(name)) for name in self.config.members]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError("each member embeds tokens on its own")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The members' hidden states and each token's row of the batch, `[N, sum of D + 8]`."""
        by_name: dict[str, Tensor] = {}
        for shared in self.shared.values():
            by_name |= zip(shared.members, shared.forward(input_ids, positions), strict=True)
        hidden = [by_name[name] for name in self.config.members]
        return torch.cat([*hidden, _row_columns(hidden[0])], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixed logits `[N, V]`, None on ranks above 0 where vLLM gathers them on rank 0."""
        *parts, rows = torch.split(hidden_states, [*self.widths, ROW_COLUMNS], dim=-1)
        weights = self._weights(rows)
        if self.one_head:
            mixed: Tensor | None = self.policy.compute_logits(mix_logits(parts, weights).to(hidden_states.dtype))
            return mixed
        logits = [member.compute_logits(part) for member, part in zip(self.members, parts, strict=True)]
        if logits[0] is None:
            return None
        return mix_logits([z[..., : self.vocab_size] for z in logits], weights, self.config.scheme)

    def _weights(self, row_columns: Tensor) -> Tensor:
        requests = RequestWeights.instances.get(self.instance_id)
        if requests is None or not requests.own:
            return torch.tensor(self.config.weights)
        if requests.sampling:  # one row a request, in order: known without waiting for the device
            requests.sampling = False
            return requests.of_rows(range(len(row_columns)))
        return requests.of_rows((row_columns[:, 0] * ROW_BASE + row_columns[:, 1]).long().tolist())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._without_adapters(weights))

    def _without_adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The models' own weights, under the names that they have without adapters."""
        for name, weight in weights:
            model, _, path = name.partition(".")
            if not self.shared[model].load_adapter_weight(path, weight):
                yield name.replace(".base_layer.", "."), weight


def kv_bytes_per_token(vllm_config: VllmConfig) -> int:
    """What a token costs in the KV cache of all layers of all members; in layers with a window, while it is in it."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, Attention)]
    return sum(spec.page_size_bytes // spec.block_size for spec in specs)


def _has_linear_head(model: nn.Module) -> bool:
    """Whether the logits are a product with the hidden state: no bias, whose weight is the sum of weights, no cap."""
    modules = list(model.modules())
    has_bias = any(isinstance(m, ParallelLMHead) and getattr(m, "bias", None) is not None for m in modules)
    return not has_bias and all(m.soft_cap is None for m in modules if isinstance(m, LogitsProcessor))


def _row_columns(hidden_ND: Tensor) -> Tensor:
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # vLLM measures memory: there are no requests
        return hidden_ND.new_zeros(len(hidden_ND), ROW_COLUMNS)
    starts = next(iter(metadata.values())).query_start_loc
    row = torch.searchsorted(starts[1:], torch.arange(len(hidden_ND), device=starts.device), right=True)
    columns = [row // ROW_BASE, row % ROW_BASE, *[torch.zeros_like(row)] * (ROW_COLUMNS - 2)]
    return torch.stack(columns, dim=-1).to(hidden_ND.dtype)


def member_vllm_config(vllm_config: VllmConfig, name: str, config: PreTrainedConfig) -> VllmConfig:
    """vLLM's configuration of one member: what it would be if that member were served alone."""
    config = copy.deepcopy(config)
    # members with equal configurations would share one compiled artefact
    config.logitmix_member = name
    member = vllm_config.with_hf_config(config, config.architectures)
    text_config = config.get_text_config()
    member.model_config.hf_text_config = text_config
    member.model_config.model_arch_config = member.model_config.get_model_arch_config()
    cache_config = copy.copy(vllm_config.cache_config)
    # as vLLM sets it: where windows alternate with full attention, this would be every layer's
    all_slide = set(getattr(text_config, "layer_types", None) or ["sliding_attention"]) == {"sliding_attention"}
    cache_config.sliding_window = member.model_config.get_sliding_window() if all_slide else None
    return replace(member, cache_config=cache_config)
