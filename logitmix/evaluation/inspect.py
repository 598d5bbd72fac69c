"""One response of a mixture, token by token: what each member would have written, and which members carried it.

Shape legend: K members, T tokens of the response, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitmix.evaluation.requests import one_hot_weights
from logitmix.mixture.context import context_length, longest_prompt, validate_fits_context
from logitmix.mixture.decoding.loop import Decoding, validate_decoding
from logitmix.mixture.generation import GREEDY, generate_completions, tokenize_prompts
from logitmix.mixture.mixing import mix_logits, weights_to_alpha
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.tasks.templates import Prompt

MIXTURE = "mixture"
TOP = 5
_ROWS = 64  # positions whose distributions are held in memory at a time


@dataclass(frozen=True)
class Candidate:
    """One of the most probable tokens of a distribution."""

    text: str
    probability: float


@dataclass(frozen=True)
class InspectedToken:
    """A token of the mixture's response.

    probabilities: of this token under each member and the mixture, after the same text
    top:           the five most probable tokens of each; the first is the argmax
    first_of:      the members whose most probable token it is
    carried_by:    the member, if it is that of one alone; else a word for all, some or none of the members: one of
                   `Inspection.carriers`
    """

    text: str
    probabilities: Mapping[str, float]
    top: Mapping[str, tuple[Candidate, ...]]
    first_of: tuple[str, ...]
    carried_by: str


@dataclass(frozen=True)
class Inspection:
    """The tokens of the mixture's greedy response, and the greedy responses of each member and the mixture.

    `weights` are those of the members, by their names.
    """

    prompt: str
    weights: Mapping[str, float]
    scheme: str
    tokens: tuple[InspectedToken, ...]
    responses: Mapping[str, str]

    @property
    def carriers(self) -> dict[str, str]:
        """Who may carry a token, and what that means, in the order of a legend."""
        return carriers(list(self.weights))

    @property
    def setting(self) -> str:
        """The weights and the scheme, in words."""
        alpha = weights_to_alpha(list(self.weights.values()))
        weights = ", ".join(f"{weight:g}" for weight in self.weights.values())
        return f"{f'weights {weights}' if alpha is None else f'alpha {alpha:g}'}, scheme {self.scheme}"

    def carried(self) -> dict[str, int]:
        """The number of tokens by carrier."""
        counts = dict.fromkeys(self.carriers, 0)
        for token in self.tokens:
            counts[token.carried_by] += 1
        return counts


def carriers(members: Sequence[str]) -> dict[str, str]:
    """Who may carry a token of a mixture of these members, and what that means."""
    if len(members) == 2:
        policy, anchor = members
        return {
            "both": f"the most probable token of {policy} and {anchor}",
            policy: f"the {policy}'s most probable token, and not the {anchor}'s",
            anchor: f"the {anchor}'s most probable token, and not the {policy}'s",
            "neither": "neither's most probable token, only the mixture's",
        }
    return {
        "all": "the most probable token of all members",
        **{name: f"the most probable token of {name}, and of no other member" for name in members},
        "several": "the most probable token of several members, and not of all",
        "none": "no member's most probable token, only the mixture's",
    }


@torch.no_grad()
def inspect(
    model: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
    decoding: Decoding = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Inspection:
    """Decode the prompt greedily with each member and the mixture, and inspect each token of the mixture's response.

    Probabilities come from one pass of each member over the whole text, at temperature 1; of a member with a prompt of
    its own in the configuration, over that and the response. Raises `ValueError` where prompt and response exceed the
    context, and for a `decoding` that the mixture does not have.
    """
    validate_decoding(model, decoding)
    (prompt_ids,) = tokenize_prompts(tokenizer, [prompt], chat_template_kwargs)
    length, longest = longest_prompt(model.config, len(prompt_ids))
    validate_fits_context(context_length(model.config), length, max_new_tokens, longest)
    names, own = model.config.display_names, model.config.weights
    settings = GREEDY | {"max_new_tokens": max_new_tokens}
    completions = {
        name: generate_completions(model, tokenizer, [prompt_ids], settings, stop_strings, decoding, weights=weights)[
            0
        ]
        for name, weights in (one_hot_weights(names) | {MIXTURE: own}).items()
    }
    ids = completions[MIXTURE]
    return Inspection(
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids),
        weights=dict(zip(names, own, strict=True)),
        scheme=model.config.scheme,
        tokens=_inspect_tokens(model, tokenizer, prompt_ids, ids),
        responses={name: tokenizer.decode(text, skip_special_tokens=True) for name, text in completions.items()},
    )


def _inspect_tokens(
    model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int]
) -> tuple[InspectedToken, ...]:
    V, names = model.config.vocab_size, model.config.display_names
    members = []
    for name in model.config.members:
        text = torch.tensor([model.config.member_prompts.get(name, prompt_ids) + ids], device=model.device)
        with model.as_member(name) as member:
            output = member(text, attention_mask=torch.ones_like(text), logits_to_keep=len(ids) + 1)
            members.append(output.logits[0, :-1, :V])
    tokens: list[InspectedToken] = []
    for start in range(0, len(ids), _ROWS):
        logits = [logits_TV[start : start + _ROWS] for logits_TV in members]
        mixture = mix_logits([z[None] for z in logits], model.config.weights, model.config.scheme, model.config.cut)[0]
        distributions = dict(zip([*names, MIXTURE], (_softmax(z) for z in (*logits, mixture)), strict=True))
        tops = {name: p_TV.topk(TOP) for name, p_TV in distributions.items()}
        for t, token in enumerate(ids[start : start + _ROWS]):
            top = {
                name: tuple(
                    Candidate(token_text(tokenizer, i), p)
                    for i, p in zip(found.indices[t].tolist(), found.values[t].tolist(), strict=True)
                )
                for name, found in tops.items()
            }
            first_of = tuple(name for name in names if int(tops[name].indices[t, 0]) == token)
            tokens.append(
                InspectedToken(
                    text=token_text(tokenizer, token),
                    probabilities={name: float(p_TV[t, token]) for name, p_TV in distributions.items()},
                    top=top,
                    first_of=first_of,
                    carried_by=_carrier(first_of, names),
                )
            )
    return tuple(tokens)


def _softmax(logits_TV: Tensor) -> Tensor:
    return torch.softmax(logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float(), dim=-1)


def _carrier(first_of: Sequence[str], members: Sequence[str]) -> str:
    if len(first_of) == 1:
        return first_of[0]
    every, *_, none = carriers(members)
    return every if len(first_of) == len(members) else "several" if first_of else none


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; if its bytes are not whole characters, as it is written in the vocabulary."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
