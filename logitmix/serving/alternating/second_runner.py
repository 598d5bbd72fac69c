"""The parts of vLLM's second model runner that take turns: its samplers and its speculator.

Shape legend: N requests of a step, R rows of logits, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from logitmix.serving.alternating.slots import NONE, SlotTurns, Step


def step_of(input_batch: InputBatch) -> Step:
    """The requests of a step. Each has one row of logits, and one more after its draft."""
    first_N = input_batch.cu_num_logits[:-1].long()
    has_draft_N = input_batch.cu_num_logits[1:] - first_N > 1
    token_R = input_batch.logits_indices
    draft_N = input_batch.input_ids[token_R[first_N + has_draft_N]].long()
    return Step(
        slots_N=input_batch.idx_mapping.long(),
        first_N=first_N,
        position_N=input_batch.positions[token_R[first_N]].long(),
        draft_N=torch.where(has_draft_N, draft_N, NONE),
    )


class TurnSampler:
    """Wraps one of vLLM's two samplers, with or without drafts, to sample from the logits that a turn mixes.

    `model.turn` is the member that ran. All other attributes are those of the sampler.
    """

    def __init__(self, sampler: Any, turns: SlotTurns, model: Any) -> None:
        self.sampler, self.turns, self.model = sampler, turns, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: Tensor, input_batch: InputBatch, *args: Any) -> SamplerOutput:
        turns = self.turns
        mixed_RV = turns.mix(self.model.turn, step_of(input_batch), logits)
        output: SamplerOutput = self.sampler(mixed_RV, input_batch, *args)
        output.num_sampled = turns.judge(output.sampled_token_ids[:, 0], output.num_sampled)
        if self.model.turn is not None:
            # vLLM counts a request's tokens as read but for these: the next step begins at its last token
            num_rows_N = input_batch.cu_num_logits.diff()
            output.num_rejected = (num_rows_N - output.num_sampled).to(output.num_rejected.dtype)
        return output


class MemberSpeculator(BaseSpeculator):
    """Drafts from the logits of the member that ran, instead of running a draft model.

    `turns` is set once the model is loaded. `draft_logits` `[slots, 1, V]` are those that the drafts were drawn from,
    before the requests' temperature, as vLLM's rejection sampler takes them.
    """

    supports_mm_inputs = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.use_fp64 = vllm_config.model_config.use_fp64_gumbel
        self.turns: SlotTurns | None = None
        self.drafts: tuple[list[str], Tensor] | None = None  # of the last step, by the requests' names

    @property
    def draft_logits(self) -> Tensor | None:
        return None if self.turns is None else self.turns.logits_SV[:, None]

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No model drafts."""

    def capture(self) -> None:
        """No model drafts."""

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """The drafts `[N, 1]`, NONE where a request has none."""
        if dummy_run or self.turns is None:
            return torch.zeros_like(input_batch.idx_mapping)[:, None]

        def draw(logits_NV: Tensor, slots_N: Tensor, position_N: Tensor) -> Tensor:
            return gumbel_sample(
                logits_NV, slots_N, temperature, seeds, position_N, apply_temperature=True, is_drafting=True,
                use_fp64=self.use_fp64,
            )  # fmt: skip

        drafts_N = self.turns.draft(draw)
        self.drafts = input_batch.req_ids, drafts_N
        return drafts_N[:, None]

    def drafts_of_requests(self) -> tuple[list[str], list[list[int]]]:
        """The names of the last step's requests, and the draft that each has, if any; this waits for the device."""
        if self.drafts is None:
            return [], []
        names, drafts_N = self.drafts
        return names, [[] if draft == NONE else [draft] for draft in drafts_N.tolist()]
