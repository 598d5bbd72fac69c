"""The mixture as a vLLM model: runs the members, and mixes their logits at each request's weights.

Shape legend: N tokens, D width of a member's hidden states, V vocabulary, K members.

vLLM builds each member under its own prefix, so that its attention layers, its share of the KV cache and its weights
have their own names. `forward` runs the members on the same tokens and returns their hidden states side by side.
`compute_logits` splits them, projects each with its member's head, and mixes them at the weights of each token's
request, which `BatchWeights` keeps.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from logitmix.mixture.mixing import mix_logits
from logitmix.serving.adapters import SharedModel
from logitmix.serving.vllm_patches import kv_bytes_per_token, member_vllm_config, request_starts
from logitmix.serving.weights import BatchWeights

logger = init_logger("vllm.logitmix")

# `forward` appends the batch row of each token's request to its hidden states. The row takes two columns, because
# bfloat16 is exact only up to 256; the other columns are padding that keeps the hidden states aligned.
ROW_BASE, ROW_COLUMNS = 128, 8


class LogitMixForCausalLM(nn.Module):
    """`z_mix = sum_k w_k z_k` over members that vLLM supports (arXiv 2605.20555, eq. 1)."""

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
        # members that share a linear head: mix the hidden states and project once
        self.has_one_head = (
            len(self.config.model_names) == 1 and self.config.scheme == "logit" and _has_linear_head(self.policy)
        )
        self.instance_id = vllm_config.instance_id
        # vLLM's error for a context that does not fit names the whole cache only
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
        """The members' hidden states, then the batch row of each token's request: `[N, sum of D + ROW_COLUMNS]`."""
        hidden: dict[str, Tensor] = {}
        for shared in self.shared.values():
            hidden |= zip(shared.members, shared.forward(input_ids, positions), strict=True)
        hidden_ND = [hidden[name] for name in self.config.members]
        return torch.cat([*hidden_ND, _encode_rows(hidden_ND[0])], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's logits `[N, V]`; None on ranks above 0 if vLLM gathers them on rank 0."""
        *hidden_ND, row_columns = torch.split(hidden_states, [*self.widths, ROW_COLUMNS], dim=-1)
        weights = self._request_weights(row_columns)
        if self.has_one_head:
            mixed_ND = mix_logits(hidden_ND, weights).to(hidden_states.dtype)
            mixed_NV: Tensor | None = self.policy.compute_logits(mixed_ND)
            return mixed_NV
        logits_NV = [member.compute_logits(h_ND) for member, h_ND in zip(self.members, hidden_ND, strict=True)]
        if logits_NV[0] is None:
            return None
        return mix_logits([z_NV[..., : self.vocab_size] for z_NV in logits_NV], weights, self.config.scheme)

    def _request_weights(self, row_columns: Tensor) -> Tensor:
        """The weights `[N, K]` of each token's request, or `[K]` if no request sets its own."""
        batch = BatchWeights.instances.get(self.instance_id)
        if batch is None or not batch.by_row:
            return torch.tensor(self.config.weights)
        if batch.next_rows_are_requests:  # reading the rows would wait for the device
            batch.next_rows_are_requests = False
            return batch.weights_of(range(len(row_columns)))
        return batch.weights_of(_decode_rows(row_columns))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._without_adapters(weights))

    def _without_adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The models' own weights, under their names in a model without adapters."""
        for name, weight in weights:
            model, _, path = name.partition(".")
            if not self.shared[model].load_adapter_weight(path, weight):
                yield name.replace(".base_layer.", "."), weight


def _has_linear_head(model: nn.Module) -> bool:
    """Whether the logits are linear in the hidden state: they have no soft cap and no bias."""
    modules = list(model.modules())
    has_bias = any(isinstance(m, ParallelLMHead) and getattr(m, "bias", None) is not None for m in modules)
    return not has_bias and all(m.soft_cap is None for m in modules if isinstance(m, LogitsProcessor))


def _encode_rows(hidden_ND: Tensor) -> Tensor:
    """The batch row of each token's request, as `ROW_COLUMNS` columns in the dtype of the hidden states."""
    starts = request_starts()
    if starts is None:
        return hidden_ND.new_zeros(len(hidden_ND), ROW_COLUMNS)
    rows = torch.searchsorted(starts[1:], torch.arange(len(hidden_ND), device=starts.device), right=True)
    columns = [rows // ROW_BASE, rows % ROW_BASE, *[torch.zeros_like(rows)] * (ROW_COLUMNS - 2)]
    return torch.stack(columns, dim=-1).to(hidden_ND.dtype)


def _decode_rows(row_columns: Tensor) -> list[int]:
    return (row_columns[:, 0] * ROW_BASE + row_columns[:, 1]).long().tolist()
