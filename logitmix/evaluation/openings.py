"""How surely models open a template's format: the margin of its tokens after a worked solution.

A geometric mixture loses a token that one member never considers, so the margins of both members say from which alpha
on the mixture follows the template.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
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


def sufficient_weight(a: Sequence[Opening], b: Sequence[Opening]) -> float:
    """The weight of b from which on the geometric mixture of a and b writes every token of the opening.

    At weight w the margin of a token is at least `(1 - w) m_a + w m_b`, for the margins m under a and b, whose largest
    other tokens may differ. This is the smallest w at which that is 0 for all tokens of a problem, as the median over
    problems; 0 where a alone writes them, and infinite where neither does.
    """

    def least(x: Opening, y: Opening) -> float:
        needed = 0.0
        for m_a, m_b in zip(x.margins, y.margins, strict=True):
            if m_a <= 0:
                needed = max(needed, inf if m_b <= 0 else m_a / (m_a - m_b))
        return needed

    return median(least(x, y) for x, y in zip(a, b, strict=True))


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
        if problem.solution is not None:
            start, stop, completion = _locate(task.template, problem)
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


def _locate(template: Template, problem: Problem) -> tuple[int, int, str]:
    """Where a perfect response opens its answer, and where the answer itself begins; and the response."""
    before, _, after = template.completion_format.partition("{solution}")
    opening, _, _ = after.partition("{answer}")
    solution = problem.solution or ""
    solution = unbox(solution) if "\\boxed" in template.completion_format else solution
    start = len(before.format()) + len(solution.strip())
    return start, start + len(opening.format()), template.completion(problem.solution or "", problem.answer)
