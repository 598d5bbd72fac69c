"""Loading members and holding their tokenizers against each other."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Member = PreTrainedModel | str | os.PathLike[str]


def open_members(
    sources: Sequence[Member], **kwargs: Any
) -> tuple[list[PreTrainedModel], PreTrainedTokenizerBase | None]:
    """The members, loaded where they are folders or hub ids, and the one tokenizer of those that have it beside them.

    Raises `ValueError` for a member that does not exist or is given twice, and for tokenizers that differ.
    """
    for i, source in enumerate(sources):
        if isinstance(source, PreTrainedModel) and any(source is other for other in sources[:i]):
            raise ValueError(
                "the same model object is given twice; freezing the anchor would freeze the policy with it. "
                "Load it twice, or pass copy.deepcopy(model) as the anchor"
            )
    # The tokenizers first: they are small, and what they rule out need not be loaded.
    tokenizers = [load_tokenizer(str(source)) for source in sources if not isinstance(source, PreTrainedModel)]
    tokenizer = require_same_tokenizer([t for t in tokenizers if t is not None])
    members = [
        source if isinstance(source, PreTrainedModel) else load_member(str(source), **kwargs) for source in sources
    ]
    vocab_size = min(member.config.get_text_config(decoder=True).vocab_size for member in members)
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but a member has logits for only {vocab_size}; "
            "the members' vocabularies may differ in padding rows alone"
        )
    return members, tokenizer


def load_member(source: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(source)`, or a `ValueError` of one sentence."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except OSError as error:
        raise ValueError(
            f"no model at {source!r}: it is neither a folder with a config.json and weights nor a model id that the "
            f"hub could be asked for ({_first_line(error)})"
        ) from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError):  # what transformers raises for a folder without tokenizer files
        return None


def require_same_tokenizer(tokenizers: Sequence[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase | None:
    """The first of the tokenizers, if all give the same ids to the same tokens.

    Raises `ValueError` that names the first token, in the order of ids, on which two of them differ.
    """
    if not tokenizers:
        return None
    first, *others = tokenizers
    vocabulary = first.get_vocab()
    for other in others:
        other_vocabulary = other.get_vocab()
        if vocabulary == other_vocabulary:
            continue
        ours = {i: token for token, i in vocabulary.items()}
        theirs = {i: token for token, i in other_vocabulary.items()}
        i = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        raise ValueError(
            f"the members' tokenizers differ: token {i} is {_quote(ours.get(i))} in {first.name_or_path!r} and "
            f"{_quote(theirs.get(i))} in {other.name_or_path!r}; members of one mixture need one tokenizer"
        )
    return first


def _quote(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
