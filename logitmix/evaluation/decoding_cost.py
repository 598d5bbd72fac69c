"""What decoding with each model of a comparison costs: tokens a second, and the memory of weights and KV cache."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.requests import make_requests, one_hot_weights
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks import Problem, Task

ROWS = 32  # responses that are timed, decoded together


@dataclass(frozen=True)
class DecodingCost:
    """Greedy responses of one model, decoded together, and the memory that it takes.

    `tokens` are those of the responses, without padding. `weight_bytes` are those of the weights that it runs, and
    `cache_bytes` what each token of the context adds to the KV cache of a response, of all members that run.
    """

    name: str
    responses: int
    tokens: int
    seconds: float
    weight_bytes: int
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def decoding_costs(
    models: Mapping[str, tuple[PreTrainedModel, float | None]],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int | None = None,
) -> list[DecodingCost]:
    """Decode the first `ROWS` problems with each model, once.

    `models` maps a name to a model and, for a mixture, an alpha. At alpha 0 and 1, and without one under the name of
    a member, a mixture runs that member alone; else None is its own alpha. The first call of a model is slower than
    later ones; decode with each before.
    """
    costs = []
    for name, (model, alpha) in models.items():
        decode = make_decoder(model, tokenizer, task, problems[:ROWS], max_new_tokens)
        batch = make_requests({name: alpha}, len(problems[:ROWS]))
        started = time.perf_counter()
        completions = decode.complete(batch)
        seconds = time.perf_counter() - started
        tokens = sum(map(len, completions))
        member = _runs_alone(model, name, alpha)
        sizes = weight_bytes(model, member), cache_bytes(model, member)
        costs.append(DecodingCost(name, len(completions), tokens, seconds, *sizes))
    return costs


def _runs_alone(model: PreTrainedModel, name: str, alpha: float | None) -> str | None:
    """The member that alone runs for requests of that name and alpha; None for the whole model."""
    if not isinstance(model, LogitMixForCausalLM):
        return None
    if alpha is None:
        return dict(zip(model.config.display_names, model.config.members, strict=True)).get(name)
    policy, anchor = model.config.members
    return {0.0: policy, 1.0: anchor}.get(alpha)


def weight_bytes(model: PreTrainedModel, member: str | None = None) -> int:
    """The bytes of the weights that the model holds, or one member of a mixture; shared ones once.

    Of adapters on one base, a member has its own and the base.
    """
    if not isinstance(model, LogitMixForCausalLM) or member is None:
        return _bytes(dict(model.named_parameters()))
    others = {*model.config.members} - {member}  # also the names of their adapters
    module: Any = getattr(model, model.config.model_of(member))
    return _bytes(
        {key: p for key, p in module.named_parameters() if not any(part in others for part in key.split("."))}
    )


def _bytes(parameters: Mapping[str, Any]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters.values()}.values())


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, member: str | None = None) -> int:
    """The bytes by which the KV cache of a sequence grows from its first token to its second, or that of one member.

    For attention this is `2 · layers · key-value heads · head size · bytes of a value`. States of a fixed size, as of
    state-space layers, do not count, and layers with a sliding window grow no more beyond it.
    """
    options = {} if member is None else {"weights": one_hot_weights(model.config.members)[member]}
    sizes = []
    for length in (1, 2):
        ids = torch.ones(1, length, dtype=torch.long, device=model.device)
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options).past_key_values
        states = [state for layer in cache.layers for state in vars(layer).values()]
        sizes.append(sum(state.numel() * state.element_size() for state in states if isinstance(state, Tensor)))
    return sizes[1] - sizes[0]
