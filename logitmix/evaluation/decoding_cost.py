"""What decoding with each model of a comparison costs: tokens a second, and the memory of its weights."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.decode import make_decoder, make_requests
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks import Problem, Task

ROWS = 32  # responses that are timed, decoded together


@dataclass(frozen=True)
class DecodingCost:
    """Greedy responses of one model, decoded together, and the bytes of the weights that it runs.

    `tokens` are those of the responses, without padding.
    """

    name: str
    responses: int
    tokens: int
    seconds: float
    weight_bytes: int

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

    `models` maps a name to a model and, for a mixture, an alpha: 0 and 1 run one member, None is its own. The first
    call of a model is slower than later ones; decode with each before.
    """
    costs = []
    for name, (model, alpha) in models.items():
        decode = make_decoder(model, tokenizer, task, problems[:ROWS], max_new_tokens)
        batch = make_requests({name: alpha}, len(problems[:ROWS]))
        started = time.perf_counter()
        completions = decode.complete(batch)
        seconds = time.perf_counter() - started
        tokens = sum(map(len, completions))
        costs.append(DecodingCost(name, len(completions), tokens, seconds, weight_bytes(model, alpha)))
    return costs


def weight_bytes(model: PreTrainedModel, alpha: float | None = None) -> int:
    """The bytes of the weights that the model holds, shared ones once; at alpha 0 and 1 of that member alone.

    Of adapters on one base, a member has its own and the base.
    """
    if not isinstance(model, LogitMixForCausalLM) or alpha not in (0.0, 1.0):
        return _bytes(dict(model.named_parameters()))
    policy, *anchors = names = model.config.members
    name = policy if alpha == 0 else anchors[0]
    others = {*names} - {name}  # also the names of their adapters
    module: Any = getattr(model, model.config.model_of(name))
    return _bytes(
        {key: p for key, p in module.named_parameters() if not any(part in others for part in key.split("."))}
    )


def _bytes(parameters: Mapping[str, Any]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters.values()}.values())
