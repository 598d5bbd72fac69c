"""Greedy responses to a task's problems, at any weights of the anchor, graded."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.generation import GREEDY, end_of_sequence_ids, generate_completions, tokenize_prompts
from logitmix.modeling import LogitMixForCausalLM
from logitmix.tasks import Problem, Task

MAX_NEW_TOKENS = 512  # the authors' longest response


@dataclass(frozen=True)
class Response:
    """One graded response; a line of an evaluation file.

    `name` says who answered (`"policy"`, `"anchor"`, `"mixture"`, …), `alpha` at which weight of the anchor (None: a
    model that is no mixture). `prompt` is the text that the model was given, a chat as the tokenizer rendered it.
    `length` counts tokens, `truncated` says that it reached the limit without ending.
    """

    name: str
    alpha: float | None
    problem: int
    prompt: str
    response: str
    gold: str
    format_ok: bool
    answer_ok: bool
    lenient_ok: bool
    length: int
    truncated: bool


def members_of(model: PreTrainedModel) -> dict[str, float | None]:
    """Who is evaluated: policy, anchor and mixture of a mixture with one anchor, or the model itself."""
    if isinstance(model, LogitMixForCausalLM):
        return {"policy": 0.0, "anchor": 1.0, "mixture": model.alpha}
    return {"model": None}


def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    alphas: Mapping[str, float | None],
    max_new_tokens: int | None = None,
    batch_size: int = 256,
    progress: Any = None,
) -> list[Response]:
    """Each named alpha's greedy response to each problem, in the order of `alphas`, then of `problems`.

    `max_new_tokens` defaults to 512, or less where the longest prompt leaves less of the context.
    `progress` is called with the number of responses after each batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    texts = [p if isinstance(p, str) else tokenizer.decode(ids) for p, ids in zip(prompts, prompt_ids, strict=True)]
    max_new_tokens = _new_tokens(model, prompt_ids, max_new_tokens)
    ends = end_of_sequence_ids(model, tokenizer)
    was_training = model.training
    model.eval()
    responses = []
    # One alpha a batch, so that at 0 and 1 a single member is run
    for (name, alpha), start in itertools.product(alphas.items(), range(0, len(problems), batch_size)):
        batch = range(start, min(start + batch_size, len(problems)))
        completions = generate_completions(
            model,
            tokenizer,
            [prompt_ids[i] for i in batch],
            GREEDY | {"max_new_tokens": max_new_tokens},
            task.template.stop,
            **({} if alpha is None else {"alpha": alpha}),
        )
        for i, ids in zip(batch, completions, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            grade = task.grade(text, problems[i])
            ended = ids[-1] in ends or any(stop in text for stop in task.template.stop)
            responses.append(
                Response(
                    name, alpha, i, texts[i], text, problems[i].answer, grade.format_ok, grade.answer_ok,
                    grade.lenient_ok, len(ids), not ended,
                )
            )  # fmt: skip
        if progress is not None:
            progress(len(batch))
    model.train(was_training)
    return responses


def _new_tokens(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int | None) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    room = None if context is None else context - len(prompt_ids[longest])
    wanted = max_new_tokens if max_new_tokens is not None else min(MAX_NEW_TOKENS, max(1, room or MAX_NEW_TOKENS))
    if room is not None and room < 1:
        raise ValueError(
            f"prompt {longest} has {len(prompt_ids[longest])} tokens, which leaves no room for a response in the "
            f"context of {context}; drop the problem"
        )
    if room is not None and wanted > room:
        raise ValueError(
            f"prompt {longest} has {len(prompt_ids[longest])} tokens; with max_new_tokens {wanted} that exceeds the "
            f"context of {context}. Drop the problem, or lower max_new_tokens"
        )
    return wanted
