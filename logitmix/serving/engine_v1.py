"""Each request's weights on vLLM's first model runner, which passes a model nothing about its requests.

A request sets its own mixture with `SamplingParams(extra_args={"alpha": 0.3})`, or `"weights"`, or
`"member": "policy"`. The engine reads them from the runner's batch, where a row is a request. Under speculative
decoding a request has one row of logits per draft token, and one more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.mixing import mix_logits
from logitmix.serving.engine import Engine, OfMixture
from logitmix.serving.requests import parse_request_weights
from logitmix.serving.vllm_patches import (
    after_batch_update,
    draw_drafts_by_seed,
    repair_expand_kernel,
    request_starts,
    requests_in_batch,
)

# `join` appends the batch row of each token's request to its hidden states. The row takes two columns, because
# bfloat16 is exact only up to 256; the other columns are padding that keeps the hidden states aligned.
ROW_BASE, ROW_COLUMNS = 128, 8


class RequestFields(LogitsProcessor, metaclass=OfMixture):
    """Rejects requests whose weights are invalid; leaves the logits unchanged."""

    config: LogitMixConfig | None = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.config is not None:
            parse_request_weights(cls.config, sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits


class FirstRunnerEngine(Engine):
    """Hands the batch row of each token's request to `compute_logits`, which looks up its weights on the host."""

    request_validator = RequestFields
    validates_beside_speculation = False

    def __init__(self, vllm_config: VllmConfig, widths: Sequence[int]) -> None:
        super().__init__(vllm_config, widths)
        self.by_row: dict[int, list[float]] = {}  # of requests that set their own
        # parsed once, by the id of a running request; None if it leaves them to the mixture
        self.by_request: dict[str, list[float] | None] = {}
        self.parsed: dict[str, SamplingParams] = {}  # a later request, or chunk of input, may have the same id
        # whether the next logits have one row per request: true if they are sampled from and there are no drafts
        self.next_rows_are_requests = False
        after_batch_update(FirstRunnerEngine.follow)
        if vllm_config.speculative_config is not None:
            repair_expand_kernel()
            draw_drafts_by_seed()

    @staticmethod
    def follow(model: Any, runner: Any, step: Any) -> None:
        """Read the batch's weights after the runner has updated it for a step, before the forward pass."""
        engine = getattr(model, "engine", None)
        if isinstance(engine, FirstRunnerEngine):
            engine.read(requests_in_batch(runner), has_drafts=bool(step.scheduled_spec_decode_tokens))

    def read(self, requests: dict[str, SamplingParams], has_drafts: bool = False) -> None:
        """Keep the weights of the requests in the batch, in the order of its rows."""
        known = {name: w for name, w in self.by_request.items() if self.parsed[name] is requests.get(name)}
        self.by_request = {
            name: known[name] if name in known else parse_request_weights(self.config, params.extra_args)
            for name, params in requests.items()
        }
        self.parsed = requests
        own = enumerate(self.by_request.values())
        self.by_row = {row: weights for row, weights in own if weights is not None}
        self.next_rows_are_requests = not has_drafts

    def join(self, hidden_ND: Sequence[Tensor], request_weights: Tensor | None) -> Tensor:
        return torch.cat([*hidden_ND, _encode_rows(hidden_ND[0])], dim=-1)

    def split(self, hidden_states: Tensor) -> tuple[list[Tensor], Tensor]:
        *hidden_ND, row_columns = torch.split(hidden_states, [*self.widths, ROW_COLUMNS], dim=-1)
        return hidden_ND, self._weights_of_rows(row_columns)

    def mix(self, logits_NV: Sequence[Tensor], weights: Tensor, scheme: str) -> Tensor:
        return mix_logits(logits_NV, weights, scheme, self.cut)  # type: ignore[arg-type]

    def _weights_of_rows(self, row_columns: Tensor) -> Tensor:
        """The weights `[N, K]` of each token's request, or `[K]` if no request in the batch sets its own."""
        default = self.config.weights
        if not self.by_row:
            return torch.tensor(default)
        rows: range | list[int] = range(len(row_columns))
        if not self.next_rows_are_requests:
            rows = _decode_rows(row_columns)  # this waits for the device
        self.next_rows_are_requests = False
        return torch.tensor([self.by_row.get(row, default) for row in rows])


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
