"""How surely models open a template's format: the margin of its tokens after a worked solution.

A geometric mixture loses a token that one member never considers, so the margins of both members say from which alpha
on the mixture follows the template.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from string import Formatter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.generation import tokenize_prompts
from logitmix.mixture.scoring import following_prompts
from logitmix.tasks import Problem, Task
from logitmix.tasks.templates import Template, unbox

NUM_PROBLEMS = 20


@dataclass(frozen=True)
class Opening:
    """The tokens that open the answer in a perfect response to one problem, and their margins under a model.

    The margin of a token is its logit less the largest other one, in nats: negative where the model's first choice is
    another token.
    """

    tokens: tuple[str, ...]
    margins: tuple[float, ...]

    @property
    def weakest(self) -> int:
        return min(range(len(self.margins)), key=self.margins.__getitem__)


@dataclass(frozen=True)
class Margin:
    """The median over problems of the margin of the opening's weakest token, and the token that it mostly is."""

    nats: float
    token: str


def summarise(openings: Sequence[Opening]) -> Margin:
    tokens = Counter(opening.tokens[opening.weakest] for opening in openings)
    return Margin(median(opening.margins[opening.weakest] for opening in openings), tokens.most_common(1)[0][0])


def opening_weights(a: Sequence[Opening], b: Sequence[Opening]) -> tuple[float, float] | None:
    """The lowest and the highest weight of b at which the geometric mixture of a and b writes every token of the
    opening, as medians over problems; None if there is no such weight.

    At weight w the margin of a token is at least `(1 - w) m_a + w m_b`, for the margins m under a and b, whose largest
    other tokens may differ. It is positive above `m_a / (m_a - m_b)` for a token that only b writes, and below that
    for one that only a writes.
    """
    bounds = [_bounds(x, y) for x, y in zip(a, b, strict=True)]
    low, high = (median(ends) for ends in zip(*bounds, strict=True))
    return (low, high) if low <= high else None


def _bounds(a: Opening, b: Opening) -> tuple[float, float]:
    """The bounds of one problem, `(inf, -inf)` where neither writes some token."""
    low, high = 0.0, 1.0
    for m_a, m_b in zip(a.margins, b.margins, strict=True):
        if m_a <= 0 and m_b <= 0:
            return inf, -inf
        if m_a <= 0:
            low = max(low, m_a / (m_a - m_b))
        elif m_b <= 0:
            high = min(high, m_a / (m_a - m_b))
    return low, high


@torch.no_grad()
def measure_openings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    **forward: Any,
) -> list[Opening]:
    """The opening of each of the problems that have a worked solution; `forward` goes to the model, as `alpha=0.0`.

    Empty for a tokenizer that does not know which characters a token covers.
    """
    if not tokenizer.is_fast:
        return []
    openings = []
    for problem in problems:
        located = _locate(task.template, problem)
        if located is not None:
            start, stop, completion = located
            encoded = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
            covered = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > start and a < b <= stop]
            if covered:
                (prompt_ids,) = tokenize_prompts(tokenizer, [task.prompt(problem)], task.chat_template_kwargs)
                openings.append(_measure(model, tokenizer, prompt_ids, encoded["input_ids"], covered, forward))
    return openings


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    completion_ids: list[int],
    covered: list[int],
    forward: dict[str, Any],
) -> Opening:
    completion_ids = completion_ids[: covered[-1] + 1]
    ids_1T, n = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device), len(completion_ids)
    forward = forward | following_prompts(model, n)
    logits_1TV = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, **forward).logits
    logits_NV = logits_1TV[0, -n - 1 : -1][covered].float()
    targets_N1 = ids_1T[0, -n:][covered][:, None]
    own_N = logits_NV.gather(1, targets_N1)[:, 0]
    others_N = logits_NV.scatter(1, targets_N1, -inf).amax(1)
    tokens = tuple(tokenizer.decode([completion_ids[i]]) for i in covered)
    return Opening(tokens, tuple((own_N - others_N).tolist()))


def _locate(template: Template, problem: Problem) -> tuple[int, int, str] | None:
    """Where a perfect response opens its answer, and where the answer itself begins; and the response.

    None for a problem that has no solution, or a solution at which the response would stop: check-task reports it.
    """
    if problem.solution is None:
        return None
    try:
        completion = template.completion(problem.solution, problem.answer)
    except ValueError:
        return None
    solution = unbox(problem.solution) if "\\boxed" in template.completion_format else problem.solution
    start = position = 0
    for text, field, *_ in Formatter().parse(template.completion_format):
        position += len(text)
        if field == "answer":
            break
        if field is not None:
            start = position = position + len(solution.strip())
    return start, position, completion
