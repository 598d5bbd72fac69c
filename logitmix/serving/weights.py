"""The weights of each request in vLLM's running batch.

A request sets its own mixture with `SamplingParams(extra_args={"alpha": 0.3})`, or `"weights"`, or
`"member": "policy"`. vLLM tells only its logits processors which request is in which row of the batch. So a logits
processor that leaves the logits unchanged keeps the requests' weights, and the model reads them from it.
"""

from typing import ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.requests import parse_request_weights


class BatchWeights(LogitsProcessor):
    """Keeps the weights of the requests in the batch; leaves the logits unchanged."""

    # the mixture that this process serves: vLLM validates requests on the class
    served_config: ClassVar[LogitMixConfig | None] = None
    # by the instance id of vLLM's configuration, which the model knows too
    instances: ClassVar[dict[str, "BatchWeights"]] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = vllm_config.model_config.hf_config
        self.by_row: dict[int, list[float]] = {}  # of requests that set their own
        # whether the next logits have one row per request: those to sample from do, those of prompts do not
        self.next_rows_are_requests = False
        self.instances[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.served_config is not None:
            parse_request_weights(cls.served_config, sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that entered, left or moved in the batch; vLLM calls this before each forward pass."""
        process_dict_updates(
            self.by_row, batch_update, lambda params, _, __: parse_request_weights(self.config, params.extra_args)
        )
        self.next_rows_are_requests = True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def weights_of(self, rows: range | list[int]) -> Tensor:
        """Weights `[N, K]` of N rows of the batch, or `[K]` if no request in them sets its own."""
        default = self.config.weights
        if not any(row in self.by_row for row in rows):
            return torch.tensor(default)
        return torch.tensor([self.by_row.get(row, default) for row in rows])
