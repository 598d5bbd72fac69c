"""Trying templates with a model: a few questions decoded under each, and how surely it opens the format."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.decode import get_alphas, greedy_responses
from logitmix.evaluation.openings import Margin, measure_openings, summarise
from logitmix.evaluation.requests import Response
from logitmix.tasks import Problem, Task
from logitmix.tasks.templates import Template


@dataclass(frozen=True)
class Trial:
    """Greedy responses under one template, and the margin of its opening; or why the template cannot be used.

    `margin` is None for problems without worked solutions.
    """

    template: str
    responses: list[Response]
    margin: Margin | None = None
    refusal: str | None = None


def try_templates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    templates: Sequence[Template],
    max_new_tokens: int,
) -> Iterator[Trial]:
    """Decode the problems under each template. A mixture is tried as a whole, at its own alpha."""
    alphas = get_alphas(model)
    alpha = alphas.get("mixture")
    forward = {} if alpha is None else {"alpha": alpha}
    for template in templates:
        trial, own_tokenizer = copy.copy(task), copy.deepcopy(tokenizer)  # a tokenizer is prepared for one template
        trial.template = template
        try:
            responses = greedy_responses(
                model, own_tokenizer, trial, problems, {template.name: alpha}, max_new_tokens
            )  # fmt: skip
        except ValueError as error:
            yield Trial(template.name, [], refusal=str(error))
            continue
        openings = measure_openings(model, own_tokenizer, trial, problems, **forward)
        yield Trial(template.name, responses, summarise(openings) if openings else None)
