"""Each request's weights on vLLM's first model runner.

A request sets its own mixture with `SamplingParams(extra_args={"alpha": 0.3})`, or `"weights"`, or
`"member": "policy"`. This runner tells only its logits processors which request is in which row of the batch. So a
logits processor that leaves the logits unchanged keeps the requests' weights, and the model reads them from it.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.mixing import mix_logits
from logitmix.serving.engine import Engine, OfMixture
from logitmix.serving.requests import parse_request_weights
from logitmix.serving.vllm_patches import request_starts

# `join` appends the batch row of each token's request to its hidden states. The row takes two columns, because
# bfloat16 is exact only up to 256; the other columns are padding that keeps the hidden states aligned.
ROW_BASE, ROW_COLUMNS = 128, 8


class BatchWeights(LogitsProcessor, metaclass=OfMixture):
    """Keeps the weights of the requests in the batch; leaves the logits unchanged."""

    config: LogitMixConfig | None = None
    # by the instance id of vLLM's configuration, which the model knows too
    instances: ClassVar[dict[str, "BatchWeights"]] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.mixture: LogitMixConfig = vllm_config.model_config.hf_config
        self.by_row: dict[int, list[float]] = {}  # of requests that set their own
        # whether the next logits have one row per request: those to sample from do, those of prompts do not
        self.next_rows_are_requests = False
        self.instances[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.config is not None:
            parse_request_weights(cls.config, sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that entered, left or moved in the batch; vLLM calls this before each forward pass."""
        process_dict_updates(
            self.by_row, batch_update, lambda params, _, __: parse_request_weights(self.mixture, params.extra_args)
        )
        self.next_rows_are_requests = True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def weights_of(self, rows: range | list[int]) -> Tensor:
        """Weights `[N, K]` of N rows of the batch, or `[K]` if no request in them sets its own."""
        default = self.mixture.weights
        if not any(row in self.by_row for row in rows):
            return torch.tensor(default)
        return torch.tensor([self.by_row.get(row, default) for row in rows])


class FirstRunnerEngine(Engine):
    """Hands the batch row of each token's request to `compute_logits`, which looks up its weights on the host."""

    request_validator = BatchWeights

    def __init__(self, vllm_config: VllmConfig, widths: Sequence[int]) -> None:
        super().__init__(vllm_config, widths)
        self.instance_id = vllm_config.instance_id

    def join(self, hidden_ND: Sequence[Tensor], request_weights: Tensor | None) -> Tensor:
        return torch.cat([*hidden_ND, _encode_rows(hidden_ND[0])], dim=-1)

    def split(self, hidden_states: Tensor) -> tuple[list[Tensor], Tensor]:
        *hidden_ND, row_columns = torch.split(hidden_states, [*self.widths, ROW_COLUMNS], dim=-1)
        return hidden_ND, self._request_weights(row_columns)

    def mix(self, logits_NV: Sequence[Tensor], weights: Tensor, scheme: str) -> Tensor:
        return mix_logits(logits_NV, weights, scheme)  # type: ignore[arg-type]

    def _request_weights(self, row_columns: Tensor) -> Tensor:
        """The weights `[N, K]` of each token's request, or `[K]` if no request sets its own."""
        batch = BatchWeights.instances.get(self.instance_id)
        if batch is None or not batch.by_row:
            return torch.tensor(self.config.weights)
        if batch.next_rows_are_requests:  # reading the rows would wait for the device
            batch.next_rows_are_requests = False
            return batch.weights_of(range(len(row_columns)))
        return batch.weights_of(_decode_rows(row_columns))


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
