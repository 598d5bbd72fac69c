"""The mixture as a vLLM model: runs the members, and mixes their logits at each request's weights.

Shape legend: N tokens, D width of a member's hidden states, V vocabulary, K members.

vLLM builds each member under its own prefix, so that its attention layers, its share of the KV cache and its weights
have their own names. `forward` runs the members on the same tokens and returns their hidden states side by side.
`compute_logits` splits them, projects each with its member's head, and mixes at the weights of each token's request
(weights.py).
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig, replace
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from logitmix.mixture.mixing import mix_logits
from logitmix.serving.adapters import SharedModel
from logitmix.serving.vllm_patches import query_starts
from logitmix.serving.weights import RequestWeights

logger = init_logger("vllm.logitmix")

# The row of each token's request is passed along with its hidden states, in two columns, as bfloat16 is exact only up
# to 256. There are eight columns to keep the rows of hidden states aligned.
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
        # with one shared linear head, mix the hidden states and project once
        self.one_head = (
            len(self.config.model_names) == 1 and self.config.scheme == "logit" and _has_linear_head(self.policy)
        )
        self.instance_id = vllm_config.instance_id
        # if the context does not fit, vLLM's error says how much does
        logger.info("A token of context takes %d bytes of KV cache, of all members.", kv_bytes_per_token(vllm_config))

    @property
    def members(self) -> list[Any]:
        """The models that run the members, in the order of the weights."""
        return [getattr(self, self.config.model_of(name)) for name in self.config.members]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError("each member embeds tokens itself")

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
        """The mixed logits `[N, V]`; None on ranks above 0 if vLLM gathers them on rank 0."""
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
        if requests.sampling:  # one row per request, in order: no need to read them from the device
            requests.sampling = False
            return requests.of_rows(range(len(row_columns)))
        return requests.of_rows((row_columns[:, 0] * ROW_BASE + row_columns[:, 1]).long().tolist())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._without_adapters(weights))

    def _without_adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The models' own weights, under their names in a model without adapters."""
        for name, weight in weights:
            model, _, path = name.partition(".")
            if not self.shared[model].load_adapter_weight(path, weight):
                yield name.replace(".base_layer.", "."), weight


def kv_bytes_per_token(vllm_config: VllmConfig) -> int:
    """Bytes that a token takes in the KV cache, over all layers of all members (with a window, while in it)."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, Attention)]
    return sum(spec.page_size_bytes // spec.block_size for spec in specs)


def _has_linear_head(model: nn.Module) -> bool:
    """Whether the logits are linear in the hidden state: they have no soft cap and no bias."""
    modules = list(model.modules())
    has_bias = any(isinstance(m, ParallelLMHead) and getattr(m, "bias", None) is not None for m in modules)
    return not has_bias and all(m.soft_cap is None for m in modules if isinstance(m, LogitsProcessor))


def _row_columns(hidden_ND: Tensor) -> Tensor:
    starts = query_starts()
    if starts is None:
        return hidden_ND.new_zeros(len(hidden_ND), ROW_COLUMNS)
    row = torch.searchsorted(starts[1:], torch.arange(len(hidden_ND), device=starts.device), right=True)
    columns = [row // ROW_BASE, row % ROW_BASE, *[torch.zeros_like(row)] * (ROW_COLUMNS - 2)]
    return torch.stack(columns, dim=-1).to(hidden_ND.dtype)


def member_vllm_config(vllm_config: VllmConfig, name: str, config: PreTrainedConfig) -> VllmConfig:
    """vLLM's configuration of one member, as if that member were served alone."""
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
