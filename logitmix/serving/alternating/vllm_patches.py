"""What alternating decoding replaces in vLLM's two model runners, and the internals of vLLM that it reads.

Written against vLLM 0.32; tests/serving/test_alternating_patches.py is the contract.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, SamplerOutput

from logitmix.serving.alternating.turns import MemberTurns, Row
from logitmix.serving.alternating.validation import is_alternating


def platform_worker() -> type:
    """vLLM's worker for this platform. vLLM can be told to load another class, but not to derive that from its own."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def take_turns(runner: Any, is_second: bool) -> None:
    """Make a model runner one that takes turns; vLLM's workers choose its class themselves."""
    base = AlternatingSecondRunner if is_second else AlternatingModelRunner
    runner.__class__ = type(base.__name__, (base, type(runner)), {})


# --- the first model runner -----------------------------------------------------------------------------------------


class AlternatingModelRunner:
    """What is replaced in vLLM's first model runner, of which it is the first base class.

    vLLM lets a custom class draft, but passes it neither logits nor requests.
    """

    turns: MemberTurns

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.turns = MemberTurns(self.get_model())

    def execute_model(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run one member, or both, and mix the logits where the other member's are known."""
        turn = scheduler_output.turn  # type: ignore[attr-defined]
        self.turns.forget(None if turn.forget else scheduler_output.finished_req_ids)
        self.turns.model.turn = turn.member
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.turns.model.turn = None
        if self.execute_model_state is not None:
            self.turns.mix(turn.member, self._rows(scheduler_output), self.execute_model_state.logits)
        return output

    def _rows(self: Any, scheduler_output: SchedulerOutput) -> list[Row]:
        rows, first = [], 0
        for i, name in enumerate(self.input_batch.req_ids):
            drafts = scheduler_output.scheduled_spec_decode_tokens.get(name, ())
            start = int(self.input_batch.num_computed_tokens_cpu[i])
            position = start + scheduler_output.num_scheduled_tokens[name] - 1 - len(drafts)
            rows.append(Row(name, position, first, drafts[0] if drafts else None))
            first += 1 + len(drafts)
        return rows

    def _sample(self: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """Sample, and blank the tokens that were not drawn from the mixture."""
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None  # top-k of no rows fails
        output = super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        if self.turns.member is not None:
            if output.logprobs_tensors is not None and output.sampled_token_ids.shape[1] == 1:
                output.logprobs_tensors = _repeat_rows(output.logprobs_tensors)
            output.sampled_token_ids = self.turns.blank(output.sampled_token_ids)
        return output

    def _get_spec_decode_draft_probs(self: Any, spec_decode_metadata: Any) -> Tensor | None:
        if self.input_batch.sampling_metadata.all_greedy:
            return None
        return self.turns.draft_probs(self.input_batch.vocab_size)

    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, sampling_metadata: Any, *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        return self.turns.draft(sampled_token_ids, sampling_metadata)

    def _input_fits_in_drafter(self, *args: Any) -> bool:
        """No model drafts; the scheduler leaves out a draft that does not fit."""
        return True


def _repeat_rows(tensors: Any) -> Any:
    """Repeat each request's log-probabilities: vLLM expects a row for each column of tokens, and a turn has two."""
    parts = [part.repeat_interleave(2, 0) if isinstance(part, torch.Tensor) else part for part in tensors]
    return type(tensors)(*parts)


# --- the second model runner ----------------------------------------------------------------------------------------


def let_members_draft_on_the_second_runner() -> None:
    """Let vLLM choose its second model runner for drafts of a custom class if they are those of members.

    This runner calls no other custom class, so vLLM lists them all among its unsupported features. Versions with one
    runner have no such list.
    """
    base_features = getattr(VllmConfig, "_get_v2_model_runner_unsupported_features", None)
    if base_features is None or hasattr(base_features, "__wrapped__"):
        return

    @wraps(base_features)
    def features(config: VllmConfig) -> list[str]:
        found = base_features(config)
        if is_alternating(config.speculative_config):
            found = [feature for feature in found if "'custom_class'" not in feature]
        return found

    VllmConfig._get_v2_model_runner_unsupported_features = features  # type: ignore[method-assign]


def speculate_by_members() -> None:
    """Let the second model runner draft with `MemberSpeculator`: vLLM builds only the speculators that it knows."""
    from vllm.v1.worker.gpu import model_runner

    from logitmix.serving.alternating.second_runner import MemberSpeculator

    base_init: Callable[..., Any] = model_runner.init_speculator
    if hasattr(base_init, "__wrapped__"):
        return

    @wraps(base_init)
    def init(vllm_config: VllmConfig, device: torch.device, *args: Any) -> Any:
        if is_alternating(vllm_config.speculative_config):
            return MemberSpeculator(vllm_config, device)
        return base_init(vllm_config, device, *args)

    model_runner.init_speculator = init


class AlternatingSecondRunner:
    """What is replaced in vLLM's second model runner, of which it is the first base class.

    The samplers come from `MixtureModelState.custom_sampler`. The runner passes no turn to them or to the model.
    """

    turns: Any

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.turns = self.speculator.turns = self.model_state.turns

    def execute_model(self: Any, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run one member, or both; the logits are computed later, in `sample_tokens`."""
        turn = getattr(scheduler_output, "turn", None)  # None in vLLM's own dummy runs
        if turn is not None and turn.forget:
            self.turns.forget()
        self.turns.is_counted = turn is not None
        self.get_model().turn = None if turn is None else turn.member
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def take_draft_token_ids(self: Any) -> DraftTokenIds:
        """Also tell the scheduler which requests have no draft, and the others' ids, by which it counts."""
        return DraftTokenIds(*self.speculator.drafts_of_requests())
