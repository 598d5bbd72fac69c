"""Samples of a mixture that the task's verifier accepts, as demonstrations for SFT (rejection sampling)."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.requests import Response, make_batches, make_requests
from logitmix.evaluation.responses import open_responses
from logitmix.mixture.decoding.loop import Decoding
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks import Problem, Task


def sample_mixture(
    mixture: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    folder: str,
    arguments: Mapping[str, Any],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    decoding: Decoding = "auto",
) -> list[Response]:
    """`samples` graded responses of the mixture to each problem, also written into the folder.

    A later start with the same `arguments` continues, with the samples of an uninterrupted one. Raises `ValueError`
    for a folder with other arguments, and what `make_decoder` raises.
    """
    decoder = make_decoder(mixture, tokenizer, task, problems, max_new_tokens, temperature, seed, decoding)
    responses = open_responses(folder, arguments, {"mixture": samples * len(problems)})
    batches = make_batches(make_requests({"mixture": None}, len(problems), samples), batch_size)
    responses.add("samples of the mixture", batches, decoder)
    return responses.rows


def right_rows(task: Task, problems: Sequence[Problem], responses: Sequence[Response]) -> list[dict[str, Any]]:
    """Rows `prompt` and `completion` of the responses that are right, in the task's format, and ended by themselves.

    A right text that occurs twice is two rows: they are samples of the mixture, given that it is right. Raises
    `ValueError` where there are none.
    """
    kept = [r for r in responses if r.answer_ok and not r.truncated]
    if not kept:
        ended = sum(not r.truncated for r in responses)
        raise ValueError(
            f"none of the {len(responses)} samples is right in the task's format ({ended} ended within "
            "max_completion_length), so there is nothing to train on; raise --samples_per_prompt or "
            "--max_completion_length, lower --temperature, or use --method on_policy"
        )
    return [task.row(problems[r.problem], r.response) for r in kept]
