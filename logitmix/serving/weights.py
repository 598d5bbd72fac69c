"""The weights of each request of a running batch.

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
from logitmix.serving.requests import request_weights


class RequestWeights(LogitsProcessor):
    """Keeps the weights of the requests in the batch; leaves the logits unchanged."""

    # the mixture that this process serves: vLLM validates requests on the class
    served: ClassVar[LogitMixConfig | None] = None
    # by the instance id of vLLM's configuration, which the model knows too
    instances: ClassVar[dict[str, "RequestWeights"]] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = vllm_config.model_config.hf_config
        self.own: dict[int, list[float]] = {}
        self.sampling = False  # whether the next logits are those to sample from
        self.instances[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if cls.served is not None:
            request_weights(cls.served, sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self.own, batch_update, lambda params, _, __: request_weights(self.config, params.extra_args)
        )
        self.sampling = True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def of_rows(self, rows: range | list[int]) -> Tensor:
        """Weights `[K]`, or `[N, K]` if one of the requests in these rows has its own."""
        default = self.config.weights
        if not any(row in self.own for row in rows):
            return torch.tensor(default)
        return torch.tensor([self.own.get(row, default) for row in rows])
