"""What quantising a model changes: its distributions against the original's, at the tokens of greedy responses.

Shape legend: N tokens of responses, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.generation import GREEDY, generate_completions, tokenize_prompts
from logitmix.mixture.padding import left_pad, position_ids_from_mask
from logitmix.mixture.quantization import num_bytes
from logitmix.tasks import Problem, Task

_ROWS = 256  # tokens whose distributions are held in float32 at a time


class Change(NamedTuple):
    """Means over `tokens` tokens of responses to the task's questions.

    kl:        KL(original ‖ quantised), in nats
    worst:     the largest KL at a token
    agreement: the fraction of tokens whose most probable token is the same
    sizes:     bytes of the weights of original and quantised model
    """

    tokens: int
    kl: float
    worst: float
    agreement: float
    sizes: tuple[int, int]


def compare_quantized(
    original: PreTrainedModel,
    quantized: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Change:
    """Compare two models at each token of the original's greedy responses to the problems.

    Raises `ValueError` where a prompt and its response do not fit the context.
    """
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids = tokenize_prompts(tokenizer, prompts, task.chat_template_kwargs)
    validate_fits_context(
        context_length(original.config), max(map(len, prompt_ids)), max_new_tokens, "a prompt", "max_new_tokens"
    )
    settings, kls, agreements = GREEDY | {"max_new_tokens": max_new_tokens}, [], []
    for start in range(0, len(prompt_ids), batch_size):
        batch = prompt_ids[start : start + batch_size]
        responses = generate_completions(original, tokenizer, batch, settings, list(task.template.stop))
        for kl_N, agrees_N in _compare(original, quantized, batch, responses):
            kls.append(kl_N)
            agreements.append(agrees_N)
    kl_N, agrees_N = torch.cat(kls), torch.cat(agreements)
    size, quantized_size = (sum(map(num_bytes, model.parameters())) for model in (original, quantized))
    agreement = agrees_N.float().mean().item()
    return Change(len(kl_N), kl_N.mean().item(), kl_N.max().item(), agreement, (size, quantized_size))


@torch.no_grad()
def _compare(
    original: PreTrainedModel, quantized: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> list[tuple[Tensor, Tensor]]:
    """The KL, and whether the most probable tokens agree, at the tokens `[N]` of the responses."""
    pad = next(id for ids in prompts for id in ids)  # any token: it is masked
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    input_ids, mask = left_pad(texts, pad, original.device)
    T = max(map(len, responses))
    written = torch.zeros_like(mask[:, -T:], dtype=torch.bool)
    for row, response in zip(written, responses, strict=True):
        row[T - len(response) :] = True
    logits = []
    for model in (original, quantized):
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids_from_mask(mask)}
        output = model(**{key: value.to(model.device) for key, value in inputs.items()}, logits_to_keep=T + 1)
        logits.append(output.logits[:, -T - 1 : -1][written.to(model.device)].to(original.device))
    results = []
    for p, q in zip(*(part.split(_ROWS) for part in logits), strict=True):
        p_NV, q_NV = p.float().log_softmax(-1), q.float().log_softmax(-1)
        results.append(((p_NV.exp() * (p_NV - q_NV)).sum(-1), p_NV.argmax(-1) == q_NV.argmax(-1)))
    return results
