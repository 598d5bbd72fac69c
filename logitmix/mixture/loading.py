"""The members of a mixture, opened and held against each other."""

import copy
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.adapters import (
    NO_ADAPTER,
    Adapters,
    add_adapter,
    merge_adapter,
    read_adapter_config,
    validate_adapter_config,
    validate_adapter_targets,
)
from logitmix.mixture.configuration import LogitMixConfig, member_names

Member: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def load_members(
    sources: Sequence[Member], peft_config: PeftConfig | None = None, **kwargs: Any
) -> tuple[list[PreTrainedModel], dict[str, Any], PreTrainedTokenizerBase | None]:
    """The members, loaded where they are folders or hub ids, their adapters, and their one tokenizer.

    With an adapter for the policy (a new one, or the policy is a folder of one) the anchors share its model where
    they can: those that are adapters on the same base, and the base itself. The adapters are as in `LogitMixConfig`.

    Raises `ValueError` for a member that does not exist or is given twice, for tokenizers that differ, and for
    adapters that do not fit or do nothing.
    """
    _require_distinct(sources, peft_config)
    # The tokenizers first: they are small, and what they rule out need not be loaded.
    paths = [source.name_or_path if isinstance(source, PreTrainedModel) else str(source) for source in sources]
    tokenizers = [load_tokenizer(path) for path in paths if path]
    tokenizer = validate_same_tokenizer([t for t in tokenizers if t is not None])

    trained = [None if isinstance(source, PreTrainedModel) else read_adapter_config(str(source)) for source in sources]
    if peft_config is not None:
        validate_adapter_config(peft_config)
        if trained[0] is not None:
            raise ValueError(
                f"the policy {paths[0]!r} is an adapter already, and peft_config asks for a new one; leave out "
                "peft_config to go on with that one, or merge it into its base"
            )
    base = paths[0] if trained[0] is None else str(trained[0].base_model_name_or_path)
    if isinstance(sources[0], PreTrainedModel):
        policy = sources[0]
    else:
        policy = load_member(base, **kwargs) if trained[0] is None else load_base(trained[0], paths[0], **kwargs)
    with_adapter = peft_config is not None or trained[0] is not None
    if with_adapter and getattr(policy, "peft_config", None):
        raise ValueError("the policy has an adapter of PEFT already; merge it, or give the plain model")

    members = [policy]
    adapters: dict[str, Any] = {}
    for name, source, path, config in zip(
        member_names(len(sources))[1:], sources[1:], paths[1:], trained[1:], strict=True
    ):
        if with_adapter and config is not None and _same(str(config.base_model_name_or_path), base):
            adapters[name] = add_adapter(policy, name, config, path)
        elif with_adapter and _is_base(source, sources[0], base):
            adapters[name] = NO_ADAPTER
        if name in adapters:
            members.append(policy)
        else:
            members.append(source if isinstance(source, PreTrainedModel) else load_member(path, **kwargs))
    if with_adapter:
        folder = None if trained[0] is None else paths[0]
        if peft_config is not None:
            validate_adapter_targets(policy, peft_config)
        adapters["policy"] = add_adapter(policy, "policy", trained[0] or copy.deepcopy(peft_config), folder)
    for name, path in zip(member_names(len(sources))[1:], paths[1:], strict=True):
        if adapters.get(name, NO_ADAPTER) != NO_ADAPTER:
            Adapters(policy, list(adapters)).validate_adapter_effect(name, path)
    _require_mixable(members, tokenizer)
    return members, adapters, tokenizer


def _is_base(anchor: Member, policy: Member, base: str) -> bool:
    """Whether the anchor is the policy's model without its adapter.

    A model in memory is so only as the same object: its weights may no longer be those of the folder it came from.
    """
    if isinstance(anchor, PreTrainedModel) or isinstance(policy, PreTrainedModel):
        return anchor is policy
    return _same(str(anchor), base)


def _require_distinct(sources: Sequence[Member], peft_config: PeftConfig | None) -> None:
    for i, source in enumerate(sources):
        if not isinstance(source, (PreTrainedModel, str, os.PathLike)):
            raise ValueError(
                f"a member is a model of transformers, a folder or a hub id, got {type(source).__name__}; for a "
                "new adapter on the policy give the plain model and peft_config=LoraConfig(…), for a trained one its "
                "folder"
            )
        is_base = peft_config is not None and source is sources[0]
        if isinstance(source, PreTrainedModel) and any(source is other for other in sources[:i]) and not is_base:
            raise ValueError(
                "the same model object is given twice; freezing the anchor would freeze the policy with it. "
                "Load it twice, or pass copy.deepcopy(model) as the anchor"
            )


def _require_mixable(members: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None) -> None:
    for member in members:
        if isinstance(member.config, LogitMixConfig):
            raise ValueError(
                "a member is itself a mixture; give its members, model.policy and model.anchors, or load the mixture "
                "and set its weights"
            )
    vocab_size = min(member.config.get_text_config(decoder=True).vocab_size for member in members)
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but a member has logits for only {vocab_size}; "
            "the members' vocabularies may differ in padding rows alone"
        )


def _same(source: str, other: str) -> bool:
    """Whether two folders or hub ids are the same place."""
    return source == other or (os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(other))


def load_member(source: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(source)`, or a `ValueError` of one sentence.

    An adapter's folder gives its base with the adapter merged into it.
    """
    adapter = read_adapter_config(source)
    if adapter is not None:
        return merge_adapter(load_base(adapter, source, **kwargs), source)
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "config.json")):
        raise ValueError(f"no model at {source!r}: the folder has no config.json")
    try:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except OSError as error:
        raise ValueError(
            f"no model at {source!r}: it is neither a folder with a config.json and weights nor a model id that the "
            f"hub could be asked for ({_first_line(error)})"
        ) from error


def load_base(adapter: LoraConfig, source: str, **kwargs: Any) -> PreTrainedModel:
    """The model on which the adapter at `source` was made."""
    try:
        return load_member(str(adapter.base_model_name_or_path), **kwargs)
    except ValueError as error:
        raise ValueError(
            f"the adapter {source!r} was made on {adapter.base_model_name_or_path!r}, which is not there; correct "
            f"base_model_name_or_path in its adapter_config.json ({error})"
        ) from error


def load_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint (beside its base, where an adapter has none), or None where there is none."""
    adapter = read_adapter_config(source)
    if adapter is not None and not os.path.exists(os.path.join(source, "tokenizer_config.json")):
        return load_tokenizer(str(adapter.base_model_name_or_path), **kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError, TypeError):  # what transformers raises for a folder without tokenizer files
        return None
    # or it makes one up, with special tokens only
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def require_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint, or a `ValueError` of one sentence."""
    tokenizer = load_tokenizer(source, **kwargs)
    if tokenizer is None:
        if not os.path.isdir(source):
            raise ValueError(
                f"no model at {source!r}: there is no such folder, and no tokenizer of a model of that id could be "
                "had from the hub; correct the path or the id"
            )
        if not os.path.exists(os.path.join(source, "config.json")) and read_adapter_config(source) is None:
            raise ValueError(f"no model at {source!r}: the folder has no config.json")
        raise ValueError(
            f"there is no tokenizer at {source!r}; save the model's there, with tokenizer.save_pretrained(folder)"
        )
    return tokenizer


def validate_same_tokenizer(tokenizers: Sequence[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase | None:
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
