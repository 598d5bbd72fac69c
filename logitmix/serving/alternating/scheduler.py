"""Which member runs in a step of vLLM's scheduler, and how many tokens each has read.

vLLM counts the tokens of a request that have been computed. Here each member has its own count, and vLLM's is the
smaller of the two: the next step begins there. A decoding request has two tokens in a step, its last and the draft of
the member that ran before. The step yields one token, the draft or its correction, or none if there was no draft.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from logitmix.mixture.decoding.pass_costs import PassCosts

# The rate that is assumed before drafts are verified, and its weight in drafts. It is high because joint steps verify
# none: a low one would never be corrected.
EXPECTED_ACCEPTANCE = 0.9
EXPECTED_DRAFTS = 4
MEMORY = 0.98  # the factor by which earlier drafts count less at each step


@dataclass
class Turn:
    """What a scheduler tells the model runners about a step: an attribute `turn` of vLLM's `SchedulerOutput`."""

    member: int | None  # None: both members run
    forget: bool = False  # whether logits of earlier steps are of other weights
    starts: dict[str, int] = field(default_factory=dict)  # the first token of each request that is read


@dataclass
class Progress:
    """A running request: how many of its tokens each member has read, and the member that drafted the next."""

    read: tuple[int, int] = (0, 0)
    drafter: int | None = None


class Acceptance:
    """The acceptance rate of the last steps' drafts."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0.0

    def add_step(self, drafted: int, accepted: int) -> None:
        self.drafted = MEMORY * self.drafted + drafted
        self.accepted = MEMORY * self.accepted + accepted

    @property
    def rate(self) -> float:
        return (self.accepted + EXPECTED_DRAFTS * EXPECTED_ACCEPTANCE) / (self.drafted + EXPECTED_DRAFTS)


class AlternatingScheduler(Scheduler):
    """vLLM's scheduler, with turns of two members that share the requests' positions but not their progress."""

    num_spec_tokens: int  # of vLLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.costs = PassCosts.of_large_models(current_platform.device_type)
        self.acceptance = Acceptance()
        self.progress: WeakKeyDictionary[Request, Progress] = WeakKeyDictionary()
        self.weights_changed = False
        self.prefilled: set[str] = set()  # requests whose blocks are cached when a step is scheduled
        self.accepted: dict[str, int] = {}
        self.kv_cache_manager.allocate_slots = self.late_caching(self.kv_cache_manager.allocate_slots)  # type: ignore[method-assign]

    def late_caching(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        """`allocate_slots`, but the blocks of a decoding request enter the prefix cache after the step.

        In a turn, the other member has not written them yet. Both members read prompts, so their blocks can be cached
        at once, for other requests in the same step.
        """

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
            if request.status == RequestStatus.RUNNING and not request.is_prefill_chunk:
                kwargs["delay_cache_blocks"] = True
            else:
                self.prefilled.add(request.request_id)
            return allocate(request, *args, **kwargs)

        return allocate_slots

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if not self.running:  # so that seeds reproduce: the choices below do not depend on earlier requests
            self.acceptance = Acceptance()
        self.prefilled.clear()
        # vLLM would give a new request of one token an invalid draft, to have two tokens in each row
        num_spec_tokens = self.num_spec_tokens
        self.num_spec_tokens = 0
        step = super().schedule(*args, **kwargs)
        self.num_spec_tokens = step.num_spec_tokens_to_schedule = num_spec_tokens
        starts = {name: self.requests[name].num_computed_tokens - n for name, n in step.num_scheduled_tokens.items()}
        step.turn = Turn(self.choose_member(step), self.weights_changed, starts)  # type: ignore[attr-defined]
        self.weights_changed = False
        return step

    def choose_member(self, step: SchedulerOutput) -> int | None:
        """The member that runs: the one that did not draft. None for both, which fits all requests.

        Both run where a request has more to read than its last token, where the requests' drafts are of both members,
        and where a turn costs more than it saves.
        """
        names, drafts = step.num_scheduled_tokens, step.scheduled_spec_decode_tokens
        if not self.prefilled.isdisjoint(names) or any(n - len(drafts.get(name, ())) > 1 for name, n in names.items()):
            return None
        if self.costs.choose_num_drafts(len(names), self.acceptance.rate, max_drafts=1) is None:
            return None
        drafters = {self.progress[self.requests[name]].drafter for name in names} - {None}
        if len(drafters) == 2:
            return None
        return 1 - drafters.pop() if drafters else 0  # type: ignore[operator]

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        tokens, rows = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        drafts = scheduler_output.scheduled_spec_decode_tokens
        yielded = {name: tokens[rows[name]] if tokens else [] for name in scheduler_output.num_scheduled_tokens}
        # a correction that equals its draft counts as accepted: the member has read this token
        self.accepted = {name: int(ids[:1] == drafts.get(name, [None])) for name, ids in yielded.items()}
        verified = [name for name, ids in yielded.items() if ids and drafts.get(name)]
        self.acceptance.add_step(len(verified), sum(self.accepted[name] for name in verified))

        outputs = super().update_from_output(scheduler_output, model_runner_output)

        for name, num_scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            if request is not None and request.status == RequestStatus.RUNNING:
                num_read = num_scheduled - len(drafts.get(name, ())) + self.accepted[name]
                self.advance(request, scheduler_output.turn, num_read, has_token=bool(yielded[name]))  # type: ignore[attr-defined]
        return outputs

    def advance(self, request: Request, turn: Turn, num_read: int, has_token: bool) -> None:
        """Count the tokens that were read; the next step begins at the first token that a member has not read."""
        end = turn.starts[request.request_id] + num_read
        progress = self.progress.setdefault(request, Progress())
        if turn.member is None:
            progress.read, progress.drafter = (end, end), None
        else:
            progress.read = (end, progress.read[1]) if turn.member == 0 else (progress.read[0], end)
            drafted = not has_token or self.accepted[request.request_id]
            progress.drafter = turn.member if drafted else None
        # the last token is read again if its logits were lost
        request.num_computed_tokens = min(*progress.read, request.num_tokens - 1)
        self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the number of accepted drafts; vLLM counts the tokens beyond the first, which a turn never yields."""
        return super().make_spec_decoding_stats(
            *args, **kwargs | {"num_accepted_tokens": self.accepted[kwargs["request_id"]]}
        )

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Also forget logits: a change of weights resets the cache."""
        self.weights_changed = True
        return super().reset_prefix_cache(*args, **kwargs)
