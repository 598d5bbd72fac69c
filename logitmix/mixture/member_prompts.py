"""Members that read different prompts, and share the tokens that follow.

Shape legend: B sequences, P tokens of a prompt, S tokens that all members share, T tokens of one pass.

Each member has its own ids, attention mask, positions and length of its KV cache; of the shared tokens all members
have the same ids. The logits that are mixed are those of the last prompt token and of the shared tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.padding import left_pad, position_ids_from_mask
from logitmix.mixture.tokenizers import tokenize_texts

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]
"""One prompt for all sequences or one for each: texts, ids, or what a tokenizer returns, with its attention mask."""


@dataclass(frozen=True)
class PassInputs:
    """What one member reads in one pass: ids `[B, T]`, and its mask over all tokens so far, and positions, if any."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None

    @property
    def reads_prompt(self) -> bool:
        """Whether no tokens precede those of the pass."""
        return self.attention_mask is None or self.attention_mask.shape[1] == self.input_ids.shape[1]

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [each for each in (self.input_ids, self.attention_mask, self.position_ids) if each is not None]


@dataclass(frozen=True)
class MemberPrompts:
    """The prompts of members that read another one than `input_ids`.

    Args:
        ids: the token ids of each such member, `[B, P]` or `[1, P]`, padded on the left.
        masks: the attention masks of the ids.
        prompt_width: how many columns of `input_ids` are the prompt of the other members; the rest are shared. None
            where a pass tells it by `logits_to_keep`.
    """

    ids: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    prompt_width: int | None = None

    @classmethod
    def of(
        cls,
        prompts: "Mapping[str, Prompts] | MemberPrompts",
        config: LogitMixConfig,
        input_ids: Tensor | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token_id: int | None = None,
        new_tokens: int = 0,
    ) -> "MemberPrompts":
        """The prompts by member, checked and padded.

        Args:
            input_ids: what the members without a prompt of their own read.
            tokenizer: reads texts.
            pad_token_id: padding in tensors that come without an attention mask.
            new_tokens: how many tokens will follow the prompts.

        Raises `ValueError` for an unknown member, an empty prompt, another number of prompts than sequences, a text
        without a tokenizer, a prompt that exceeds its member's context, and members that all have a prompt.
        """
        if isinstance(prompts, MemberPrompts):
            return prompts
        if not isinstance(prompts, Mapping):
            raise ValueError(
                f"member_prompts is a {type(prompts).__name__}, but must be a dict of prompts by the names of "
                f"members: {', '.join(config.members)}"
            )
        if input_ids is None:
            raise ValueError("member_prompts need input_ids, which the members without a prompt of their own read")
        ids: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for given, value in prompts.items():
            name = config.resolve_member_name(given)
            if name in ids:
                raise ValueError(f"member_prompts has two prompts for {name}; leave one out")
            rows = read_prompts(value, name, tokenizer, pad_token_id)
            if len(rows) not in (1, len(input_ids)):
                raise ValueError(
                    f"member_prompts has {len(rows)} prompts for {name}, but the batch has {len(input_ids)} "
                    "sequences; pass one prompt for each, or one for all"
                )
            for i, row in enumerate(rows):
                where = f"the prompt of {name}" + (f" for sequence {i}" if len(rows) > 1 else "")
                config.validate_prompt(name, row, where, new_tokens)
            ids[name], masks[name] = left_pad(rows, 0 if pad_token_id is None else pad_token_id, input_ids.device)
        config.validate_some_read_the_prompt(ids)
        return cls(ids, masks)

    @property
    def width(self) -> int:
        """The most tokens of a prompt, with padding."""
        return max((ids.shape[1] for ids in self.ids.values()), default=0)

    def width_of(self, member: str, tokens: int) -> int:
        """The tokens of the member's prompt, with padding; `tokens` of `input_ids` if nothing else is known."""
        if member in self.ids:
            return self.ids[member].shape[1]
        return tokens if self.prompt_width is None else self.prompt_width

    def with_prompt_width(self, width: int) -> "MemberPrompts":
        """For `generate`, which passes all of the sequences, or only their last token, to each pass."""
        return replace(self, prompt_width=width)

    def inputs(
        self,
        members: Sequence[str],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cached: Mapping[str, int],
        logits_to_keep: int | Tensor,
    ) -> tuple[dict[str, PassInputs], int]:
        """What each of the members reads in a pass, and how many logits at its end all members have.

        `cached` are the tokens in each member's KV cache. In the pass that reads the prompts, the last
        `logits_to_keep - 1` tokens of `input_ids` are shared, unless `prompt_width` says how many.
        """
        if not isinstance(logits_to_keep, int):
            raise ValueError("logits_to_keep must be a number with member_prompts, whose members have other positions")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("member_prompts need an attention mask [B, T], from which each member's own is made")
        B, T = input_ids.shape
        # shared tokens in the cache of a member with a prompt of its own
        num_shared = max((cached[name] - self.ids[name].shape[1] for name in members if name in self.ids), default=0)
        if self.prompt_width is not None:
            # members of one pass have caches of one length, in which the longest prompt has no padding
            widths = {name: self.ids[name].shape[1] if name in self.ids else self.prompt_width for name in members}
            num_shared = min((cached[name] - widths[name] for name in members if cached[name]), default=0)
        if attention_mask is not None:
            num_cached = attention_mask.shape[1] - T
        else:
            others = [cached[name] for name in members if name not in self.ids]
            num_cached = max(others, default=max(num_shared, 0))
            if self.prompt_width is not None:
                num_cached = self.prompt_width + num_shared if any(cached[name] for name in members) else 0
            attention_mask = input_ids.new_ones(B, num_cached + T)
        reads_prompt = num_cached == 0
        if self.prompt_width is not None:
            S = num_cached + T - self.prompt_width
        else:
            S = max(logits_to_keep, 1) - 1 if reads_prompt else T + num_shared
        if S < 0 or (reads_prompt and S >= T):
            raise ValueError(
                f"input_ids have {T} tokens, of which {S} are shared: none are left for the prompt; member_prompts "
                "take the whole prompt in one pass, without prefill_chunk_size"
                if S >= 0
                else "member_prompts cannot be used with prefill_chunk_size; leave it out"
            )
        inputs = {}
        for name in members:
            if name not in self.ids:
                inputs[name] = PassInputs(input_ids, attention_mask, position_ids)
                continue
            mask = self.masks[name]
            mask = torch.cat([_repeated(mask, B), attention_mask[:, num_cached + T - S :].to(mask)], dim=1)
            ids = (
                torch.cat([_repeated(self.ids[name], B), input_ids[:, T - S :]], dim=1) if reads_prompt else input_ids
            )
            inputs[name] = PassInputs(ids, mask, position_ids_from_mask(mask)[:, -ids.shape[1] :])
        kept = S + 1 if reads_prompt else T
        return inputs, min(logits_to_keep or kept, kept)


def validate_prompts_end_together(is_scored_BT: Tensor, attention_mask: Tensor | None) -> None:
    """Raise `ValueError` where sequences without padding on the left begin to be scored at different tokens.

    Their prompts have different lengths, and the tokens that all members share, from the first scored one of the batch
    on, would include the ends of the longer ones.
    """
    first = is_scored_BT.int().argmax(1)[is_scored_BT.any(1)]
    if len(first) < 2 or (first == first[0]).all() or (attention_mask is not None and not attention_mask[:, 0].all()):
        return
    raise ValueError(
        "labels begin at different tokens of sequences without padding on the left, and member_prompts stand for the "
        "tokens before the first label of the batch; pad the prompts on the left, so that all end at one token"
    )


def _repeated(rows: Tensor, B: int) -> Tensor:
    """One row for each of B sequences; `generate` repeats sequences, for beams and returned sequences, in place."""
    return rows if len(rows) == B else rows.repeat_interleave(B // len(rows), dim=0)


def read_prompts(
    prompts: Any, name: str, tokenizer: PreTrainedTokenizerBase | None, pad_token_id: int | None
) -> list[list[int]]:
    """The ids of each prompt, without padding."""
    mask = None
    if isinstance(prompts, str) or _is_list_of(prompts, str):
        if tokenizer is None:
            raise ValueError(f"the prompt of {name} is a text; pass tokenizer=…, or token ids")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        prompts = tokenize_texts(tokenizer, texts)
    elif isinstance(prompts, Mapping):
        prompts, mask = prompts.get("input_ids"), prompts.get("attention_mask")
    if hasattr(prompts, "tolist") and mask is None and pad_token_id is not None:
        mask = prompts != pad_token_id
    prompts, mask = _as_lists(prompts), _as_lists(mask)
    if _is_list_of(prompts, int):
        one_mask = mask if mask is None or not mask or not isinstance(mask[0], list) else mask[0]
        prompts, mask = [prompts], None if mask is None else [one_mask]
    if isinstance(prompts, (list, tuple)) and not prompts:
        return [[]]
    if not isinstance(prompts, (list, tuple)) or not all(not row or _is_list_of(row, int) for row in prompts):
        raise ValueError(
            f"the prompt of {name} is a {type(prompts).__name__}, but must be a text, token ids, or what the "
            "tokenizer returns; one for all sequences, or a list of one for each"
        )
    mask = [[True] * len(ids) for ids in prompts] if mask is None else mask
    if [len(ids) for ids in prompts] != [len(row) for row in mask]:
        raise ValueError(f"the attention mask of the prompt of {name} has another shape than its ids")
    rows = zip(prompts, mask, strict=True)
    return [[i for i, is_read in zip(ids, row, strict=True) if is_read] for ids, row in rows]


def _as_lists(values: Any) -> Any:
    """Tensors, and arrays, as lists; other values unchanged."""
    if isinstance(values, (list, tuple)):
        return [_as_lists(each) for each in values]
    return values.tolist() if hasattr(values, "tolist") else values


def _is_list_of(value: Any, kind: type) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(each, kind) and not isinstance(each, bool) for each in value)
