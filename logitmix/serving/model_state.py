"""The state of a mixture's requests on vLLM's second model runner.

Shape legend: N tokens of a step, K members. A slot is the index that vLLM gives a request while it runs.

The weights of all slots are one tensor on the device, and those of a step's tokens another, at an address that never
changes: a CUDA graph reads it at each replay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.alternating.second_runner import TurnSampler
from logitmix.serving.alternating.slots import SlotTurns
from logitmix.serving.alternating.validation import is_alternating
from logitmix.serving.engine_v2 import SecondRunnerEngine
from logitmix.serving.requests import parse_request_weights


class MixtureModelState(DefaultModelState):
    """Keeps the weights of each request, and passes the mixture those of each token as `request_weights` `[N, K]`."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config: LogitMixConfig = vllm_config.model_config.hf_config
        self.engine: SecondRunnerEngine = model.engine  # type: ignore[assignment]
        K = len(self.config.members)
        self.slot_weights = StagedWriteTensor((self.max_num_reqs, K), dtype=torch.float32, device=device)
        self.token_weights = torch.zeros(self.max_num_tokens, K, dtype=torch.float32, device=device)
        self.tokens = torch.arange(self.max_num_tokens, dtype=torch.int32, device=device)
        # ids of running requests with a weight of 0 or below
        self.special: set[str] = set()
        self.turns: SlotTurns | None = None  # in alternating decoding

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        weights = parse_request_weights(self.config, params and params.extra_args) or self.config.weights
        self.slot_weights.stage_write(req_index, 0, weights)
        if min(weights) <= 0:
            self.special.add(new_req_data.req_id)
        if self.turns is not None:
            self.turns.forget([req_index])

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.special.discard(req_id)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.slot_weights.apply_write()

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """The samplers of turns, in alternating decoding: without drafts, and to verify drafts.

        `num_new_sampled_tokens_per_step` remains 1: the next draft comes from the logits after a draft.
        """
        speculative_config = self.vllm_config.speculative_config
        if speculative_config is None or not is_alternating(speculative_config):
            return None

        def mix(logits_KNV: Sequence[Tensor], slots_N: Tensor) -> Tensor:
            return self.engine.mix(logits_KNV, self.slot_weights.gpu[slots_N], self.config.scheme)

        self.turns = SlotTurns(self.max_num_reqs, self.config.vocab_size, self.device, mix)
        verifier = RejectionSampler(sampler, speculative_config, self.device)
        return TurnSampler(sampler, self.turns, self.model), TurnSampler(verifier, self.turns, self.model)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        self.engine.has_special_weights = bool(self.special)
        num_tokens = input_batch.num_tokens_after_padding
        # padding of the batch belongs to no request, so it may have any weights
        rows = torch.searchsorted(input_batch.query_start_loc[1:], self.tokens[:num_tokens], right=True)
        slots = input_batch.idx_mapping[rows.clamp_(max=input_batch.num_reqs - 1)]
        torch.index_select(self.slot_weights.gpu, 0, slots, out=self.token_weights[:num_tokens])
        return super().prepare_inputs(input_batch, req_states) | self._weights_of_tokens(num_tokens)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | self._weights_of_tokens(num_tokens)

    def _weights_of_tokens(self, num_tokens: int) -> dict[str, Tensor]:
        return {"request_weights": self.token_weights[:num_tokens]}
