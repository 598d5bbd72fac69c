"""Responses to decode, in batches, and the graded responses. No torch here: rates are computed without it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Up to this many sequences, one batch of alphas 0, 0.5 and 1, which runs both members on all rows, is faster than one
# batch per alpha. Measured on one CPU core (docs/analysis.md).
SMALL_BATCH = 64


@dataclass(frozen=True)
class Request:
    """A response to decode: the name of the model, its alpha, the problem, and the index of the sample."""

    name: str
    alpha: float | None
    problem: int
    sample: int = 0

    @property
    def members(self) -> float | str | None:
        """The members to run: 0.0 the policy, 1.0 the anchor, `"both"`, or None for a model that is not a mixture."""
        return self.alpha if self.alpha in (0.0, 1.0, None) else "both"


@dataclass(frozen=True)
class Response:
    """One graded response; a line of an evaluation file.

    `name` is the model (`"policy"`, `"anchor"`, `"mixture"`, …) and `alpha` the weight of the anchor (None for a model
    that is not a mixture). `sample` numbers several responses to one problem. `prompt` is the text given to the model;
    a chat is rendered by the tokenizer. `length` is in tokens; `truncated` means that the response reached the limit.
    """

    name: str
    alpha: float | None
    problem: int
    sample: int
    prompt: str
    response: str
    gold: str
    format_ok: bool
    answer_ok: bool
    lenient_ok: bool
    length: int
    truncated: bool


def make_requests(alphas: Mapping[str, float | None], num_problems: int, num_samples: int = 1) -> list[Request]:
    """A request for each alpha, problem and sample, ordered so that requests for the same members are adjacent."""
    requests = [
        Request(name, alpha, problem, sample)
        for name, alpha in alphas.items()
        for problem, sample in itertools.product(range(num_problems), range(num_samples))
    ]
    seen: dict[Any, int] = {}
    return sorted(requests, key=lambda request: seen.setdefault(request.members, len(seen)))


def make_batches(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Batches of at most `batch_size` requests for the same members, as alpha 0 and 1 need only one member.

    Few enough requests share one batch, since a decoding step then costs about the same for any number of rows (see
    `SMALL_BATCH`).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    if len(requests) <= min(batch_size, SMALL_BATCH):
        return [list(requests)] if requests else []
    groups = [list(group) for _, group in itertools.groupby(requests, key=lambda request: request.members)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def one_hot_weights(members: Sequence[str]) -> dict[str, list[float]]:
    """The weights of each member alone, by its name."""
    return {name: [float(name == other) for other in members] for name in members}
