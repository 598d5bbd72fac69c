"""One response of a mixture, token by token: what each member would have written, and which member carried it.

Shape legend: K members, T tokens of the response, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.decoding.loop import Decoding, validate_decoding
from logitmix.mixture.generation import GREEDY, generate_completions, tokenize_prompts
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks.templates import Prompt

NAMES = ("policy", "anchor", "mixture")
TOP = 5
_ROWS = 64  # positions whose distributions are held in memory at a time

Carrier = Literal["both", "policy", "anchor", "neither"]


@dataclass(frozen=True)
class Candidate:
    """One of the most probable tokens of a distribution."""

    text: str
    probability: float


@dataclass(frozen=True)
class InspectedToken:
    """A token of the mixture's response.

    probabilities: of this token under policy, anchor and mixture, after the same text
    top:           the five most probable tokens of each; the first is the argmax
    carried_by:    `"policy"` if it is the policy's most probable token and not the anchor's, `"anchor"` for the
                   reverse, `"both"`, or `"neither"` for a token that only the mixture ranks first
    """

    text: str
    probabilities: Mapping[str, float]
    top: Mapping[str, tuple[Candidate, ...]]
    carried_by: Carrier


@dataclass(frozen=True)
class Inspection:
    """The tokens of the mixture's greedy response, and the greedy responses of policy, anchor and mixture."""

    prompt: str
    alpha: float
    scheme: str
    tokens: tuple[InspectedToken, ...]
    responses: Mapping[str, str]

    def carried(self) -> dict[Carrier, int]:
        """The number of tokens by carrier."""
        counts: dict[Carrier, int] = {"both": 0, "policy": 0, "anchor": 0, "neither": 0}
        for token in self.tokens:
            counts[token.carried_by] += 1
        return counts


@torch.no_grad()
def inspect(
    model: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
    decoding: Decoding = "auto",
) -> Inspection:
    """Decode the prompt greedily with policy, anchor and mixture, and inspect each token of the mixture's response.

    Probabilities come from one pass of each member over the whole text, at temperature 1. Raises `ValueError` where
    prompt and response exceed the context, and for a `decoding` that the mixture does not have.
    """
    validate_decoding(model, decoding)
    model.config.require_one_prompt("inspect")
    (prompt_ids,) = tokenize_prompts(tokenizer, [prompt])
    validate_fits_context(context_length(model.config), len(prompt_ids), max_new_tokens)
    alphas = {"policy": 0.0, "anchor": 1.0, "mixture": model.alpha}
    settings = GREEDY | {"max_new_tokens": max_new_tokens}
    completions = {
        name: generate_completions(model, tokenizer, [prompt_ids], settings, stop_strings, decoding, alpha=alpha)[0]
        for name, alpha in alphas.items()
    }
    ids = completions["mixture"]
    return Inspection(
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids),
        alpha=model.alpha,
        scheme=model.config.scheme,
        tokens=_inspect_tokens(model, tokenizer, prompt_ids, ids),
        responses={name: tokenizer.decode(text, skip_special_tokens=True) for name, text in completions.items()},
    )


def _inspect_tokens(
    model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int]
) -> tuple[InspectedToken, ...]:
    text = torch.tensor([prompt_ids + ids], device=model.device)
    V = model.config.vocab_size
    members = []
    for name in model.config.members:
        with model.as_member(name) as member:
            output = member(text, attention_mask=torch.ones_like(text), logits_to_keep=len(ids) + 1)
            members.append(output.logits[0, :-1, :V])
    tokens: list[InspectedToken] = []
    for start in range(0, len(ids), _ROWS):
        logits = [logits_TV[start : start + _ROWS] for logits_TV in members]
        mixture = mix_logits([z[None] for z in logits], model.config.weights, model.config.scheme, model.config.cut)[0]
        distributions = dict(zip(NAMES, (_softmax(z) for z in (*logits, mixture)), strict=True))
        tops = {name: p_TV.topk(TOP) for name, p_TV in distributions.items()}
        for t, token in enumerate(ids[start : start + _ROWS]):
            top = {
                name: tuple(
                    Candidate(token_text(tokenizer, i), p)
                    for i, p in zip(found.indices[t].tolist(), found.values[t].tolist(), strict=True)
                )
                for name, found in tops.items()
            }
            tokens.append(
                InspectedToken(
                    text=token_text(tokenizer, token),
                    probabilities={name: float(p_TV[t, token]) for name, p_TV in distributions.items()},
                    top=top,
                    carried_by=_carrier(*(int(tops[name].indices[t, 0]) == token for name in ("policy", "anchor"))),
                )
            )
    return tuple(tokens)


def _softmax(logits_TV: Tensor) -> Tensor:
    return torch.softmax(logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float(), dim=-1)


def _carrier(policy: bool, anchor: bool) -> Carrier:
    if policy and anchor:
        return "both"
    return "policy" if policy else "anchor" if anchor else "neither"


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; if its bytes are not whole characters, as it is written in the vocabulary."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
