"""Alternating decoding in vLLM: the two members of a mixture take turns, about one member's pass a token.

    LLM("mixture", **alternating_decoding())

The algorithm is that of `logitmix/mixture/decoding/alternating.py`. Each file has one part of it:

- `scheduler.py` chooses the member that runs in a step, and counts the tokens that each member has read.
- `turns.py` mixes the logits of the member that ran with those that the other left, and drafts the next tokens, on
  vLLM's first model runner; `slots.py` does so on the second, without reading anything on the host.
- `worker.py` and `vllm_patches.py` connect it to vLLM's two model runners, `second_runner.py` to the samplers of the
  second, and `validation.py` to vLLM's configuration.
"""

from typing import Any

WORKER = "logitmix.serving.alternating.worker.AlternatingWorker"
SCHEDULER = "logitmix.serving.alternating.scheduler.AlternatingScheduler"
PROPOSER = "logitmix.serving.alternating.worker.NoProposer"


def alternating_decoding() -> dict[str, Any]:
    """The arguments of vLLM's `LLM` (and `EngineArgs`) that turn on alternating decoding of a mixture.

    It needs a mixture of two full members. Raises no error itself: vLLM's configuration is validated when the engine
    starts.
    """
    return {
        # vLLM verifies the drafts as it does those of speculative decoding; a draft model does not exist
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 1},
        "worker_cls": WORKER,
        "scheduler_cls": SCHEDULER,
        "async_scheduling": False,
    }


def decoding_statistics(llm: Any) -> Any:
    """How many passes, drafts and tokens an `LLM` with alternating decoding has counted since it started.

    Returns a `DecodingStatistics`, whose `passes_per_token` and `acceptance` are the rates. A chunk of a prompt that
    both members read is two passes.
    """
    from logitmix.mixture.decoding.alternating import DecodingStatistics

    return DecodingStatistics(**llm.collective_rpc("decoding_statistics")[0])
