"""Decode-time methods of other papers as mixtures, by name: each is K members and their weights.

`z_a` are the logits of member a. Adding a constant to all logits of a member changes no distribution, so a sum of
weighted log-probabilities is the same as a sum of weighted logits. Each function takes models, folders or hub ids of
one tokenizer, passes `kwargs` to `LogitMixForCausalLM.from_members`, and returns an ordinary mixture, whose policy is
its first member. `PRESETS` has their weights as functions of alpha, for sweeps.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitmix.mixture.dtypes import validate_loading_arguments
from logitmix.mixture.loading import Member, load_member
from logitmix.mixture.member_prompts import Prompts, read_prompts
from logitmix.mixture.mixing import Plausibility, Scheme, validate_weights
from logitmix.mixture.modeling import LogitMixForCausalLM


@dataclass(frozen=True)
class Preset:
    """A method of one strength, alpha: its members' roles in order, and their weights as text and as a function."""

    name: str
    roles: tuple[str, ...]
    formula: str
    of_alpha: Callable[[float], list[float]]

    def weights(self, alpha: float) -> list[float]:
        """The members' weights at this alpha. Raises `ValueError` for an alpha that is negative or not finite."""
        if not (isinstance(alpha, Real) and math.isfinite(alpha) and alpha >= 0):
            raise ValueError(
                f"alpha is {alpha!r}, but {self.name} takes a number of at least 0: its weights are {self.formula} "
                f"for {', '.join(self.roles)}"
            )
        return self.of_alpha(float(alpha))

    def mix(self, members: Sequence[Member], weights: list[float], kwargs: dict[str, Any]) -> LogitMixForCausalLM:
        """The mixture at these weights. Raises `ValueError` for others in `kwargs`, which `from_members` takes."""
        if "weights" in kwargs:
            raise ValueError(
                f"{self.name} takes alpha, not weights: its weights are {self.formula} for {', '.join(self.roles)}; "
                "from_members takes any"
            )
        return LogitMixForCausalLM.from_members(members[0], list(members[1:]), weights=weights, **kwargs)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("dexperts", ("base", "expert", "antiexpert"), "1, +alpha, -alpha", lambda a: [1.0, a, -a]),
        Preset("proxy_tuning", ("large", "small_tuned", "small_base"), "1, +alpha, -alpha", lambda a: [1.0, a, -a]),
        Preset("contrastive_decoding", ("expert", "amateur"), "1 + alpha, -alpha", lambda a: [1.0 + a, -a]),
    )
}


def dexperts(
    base: Member, expert: Member, antiexpert: Member, alpha: float = 2.0, **kwargs: Any
) -> LogitMixForCausalLM:
    """DExperts (Liu et al. 2021, arXiv 2105.03023, eq. 2): steer a base model by what two small ones disagree on.

        p(x_t | x_<t) = softmax( z_base + alpha (z_expert - z_antiexpert) )

    The expert was tuned on text with the wanted attribute, the anti-expert on text without; the paper's alpha is 2.0
    for toxicity and 3.2 for sentiment. The paper also cuts the base model's logits to its nucleus first, which this
    does not. The weights are `[1, alpha, -alpha]`. Raises `ValueError` for a negative alpha.
    """
    preset = PRESETS["dexperts"]
    return preset.mix([base, expert, antiexpert], preset.weights(alpha), kwargs)


def proxy_tuning(
    large: Member, small_tuned: Member, small_base: Member, alpha: float = 1.0, **kwargs: Any
) -> LogitMixForCausalLM:
    """Proxy tuning (Liu et al. 2024, arXiv 2401.08565, eq. 1): what tuning a small model changed, on a large one.

        p(x_t | x_<t) = softmax( z_large + alpha (z_small_tuned - z_small_base) )

    The paper's eq. 1 has alpha = 1; its section on controlling the strength varies it. The weights are
    `[1, alpha, -alpha]`. Raises `ValueError` for a negative alpha.
    """
    preset = PRESETS["proxy_tuning"]
    return preset.mix([large, small_tuned, small_base], preset.weights(alpha), kwargs)


def contrastive_decoding(
    expert: Member, amateur: Member, alpha: float | None = 0.5, plausibility: float | None = 0.1, **kwargs: Any
) -> LogitMixForCausalLM:
    """Contrastive decoding: prefer what a strong model finds likelier than a weak one, among its plausible tokens.

        p(v | x) ∝ exp( (1 + alpha) z_expert(v) - alpha z_amateur(v) )    for v in V(x), else 0
        V(x) = { v : p_expert(v | x) >= plausibility * max_u p_expert(u | x) }

    The first line is that of O'Brien & Lewis (2023, arXiv 2309.09117), whose beta is `alpha` here and 0.5 by default;
    the weights are `[1 + alpha, -alpha]`, those of the mixture's own alpha at `-alpha`. With `alpha=None` it is the
    original (Li et al. 2023, arXiv 2210.15097), without weights: `log p_expert(v) - log p_amateur(v)`, weights
    `[1, -1]`. The second line is in both papers (where `plausibility` is called alpha; 0.1 in both); None
    leaves all tokens. It is taken before any sampling temperature. Li's temperature of the amateur is 1 here.

    Raises `ValueError` for a negative alpha, or a plausibility outside (0, 1].
    """
    preset = PRESETS["contrastive_decoding"]
    weights = [1.0, -1.0] if alpha is None else preset.weights(alpha)
    if plausibility is not None:
        Plausibility(plausibility)  # before the members load
    model = preset.mix([expert, amateur], weights, kwargs)
    model.config.set_plausibility(plausibility)
    return model


def guidance(
    model: Member,
    negative_prompt: Prompts | None = None,
    scale: float = 1.5,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> LogitMixForCausalLM:
    """Classifier-free guidance of a language model (Sanchez et al. 2023, arXiv 2306.17806): away from another prompt.

        log p(v) ∝ log p(v | n) + scale (log p(v | x) - log p(v | n))

    for the prompt x and the negative prompt n, both followed by the same new tokens. The policy reads x and the anchor
    n; both are one model, in memory once, with the weights `[scale, 1 - scale]`. At scale 1 it is the model alone;
    above, it follows x more closely. The negative prompt is part of the configuration, and
    `generate(member_prompts={"anchor": …})` replaces it for a call.

    Args:
        model: a model, a folder or a hub id.
        negative_prompt: a text, token ids, or what a tokenizer returns; None is the model's BOS alone, the
            unconditional model. It is the whole prompt of the anchor: a chat must be rendered already.
        scale: gamma of the paper, at least 1.
        tokenizer: reads the text; default: the model's own.
        kwargs: passed to `from_pretrained` for folders and hub ids.

    Raises `ValueError` for a scale below 1, a text without a tokenizer, and a model without BOS that needs it.
    """
    if not (isinstance(scale, Real) and math.isfinite(scale) and scale >= 1):
        raise ValueError(
            f"scale is {scale!r}, but guidance takes a number of at least 1: its weights are scale, 1 - scale for the "
            "model with the prompt and with the negative prompt"
        )
    other = next((key for key in ("weights", "alpha") if key in kwargs), None)
    if other is not None:
        raise ValueError(
            f"guidance takes scale, not {other}: its weights are scale, 1 - scale; from_members takes any"
        )
    scale = float(scale)
    validate_loading_arguments(kwargs, [model])
    loaded = load_member(str(model), **kwargs) if isinstance(model, (str, os.PathLike)) else model
    mixture = LogitMixForCausalLM.from_members(loaded, loaded, weights=[scale, 1 - scale])
    tokenizer = tokenizer or mixture.tokenizer
    if negative_prompt is None:
        bos = mixture.config.bos_token_id
        if bos is None:
            raise ValueError("the model has no BOS token, which an empty negative prompt is; pass negative_prompt=…")
        negative_prompt = [bos]
    if isinstance(negative_prompt, str) and tokenizer is None:
        raise ValueError("the negative prompt is a text, but the model has no tokenizer; pass tokenizer=…, or ids")
    rows = read_prompts(negative_prompt, "anchor_0", tokenizer, None)
    if len(rows) != 1:
        raise ValueError(
            f"negative_prompt is {len(rows)} prompts, but one is saved, for all sequences; pass those of each "
            'sequence to generate, as member_prompts={"anchor": …}'
        )
    mixture.config.set_member_prompts({"anchor": rows[0]})
    return mixture


def ensemble(
    members: Sequence[Member], weights: Sequence[float] | None = None, scheme: Scheme = "logit", **kwargs: Any
) -> LogitMixForCausalLM:
    """An ensemble, or opinion pool, of K members, by default with weights 1/K.

        "logit":  p(v | x) ∝ prod_k p_k(v | x)^w_k      a product of experts (Hinton 2002; Genest & Zidek 1986)
        "prob":   p(v | x) = sum_k w_k p_k(v | x)       a linear pool

    The weights are at least 0. Those of "prob" sum to 1. Those of "logit" may have another sum, which acts as an
    inverse temperature. Raises `ValueError` for other weights, or fewer than two members.
    """
    if not isinstance(members, (list, tuple)) or len(members) < 2:
        kind = repr(members) if isinstance(members, str) else f"a {type(members).__name__}"
        got = str(len(members)) if isinstance(members, (list, tuple)) else kind
        raise ValueError(f"an ensemble is a list of at least 2 members, got {got}")
    weights = [1 / len(members)] * len(members) if weights is None else weights
    numbers = validate_weights(weights, len(members), "logit")
    if (numbers < 0).any() or not numbers.any():
        raise ValueError(
            f"the weights are {weights}, but those of an ensemble are at least 0, and not all 0; dexperts, "
            "proxy_tuning and contrastive_decoding subtract a member"
        )
    return LogitMixForCausalLM.from_members(members[0], list(members[1:]), weights=weights, scheme=scheme, **kwargs)
