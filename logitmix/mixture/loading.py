"""Loading the members of a mixture, and checking that they can be mixed."""

import copy
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitmix.mixture.adapters import (
    Adapters,
    add_adapter,
    merge_adapter,
    read_adapter_config,
    validate_adapter_config,
    validate_adapter_targets,
)
from logitmix.mixture.architecture import validate_architecture
from logitmix.mixture.configuration import NO_ADAPTER, LogitMixConfig, member_names
from logitmix.mixture.dtypes import member_kwargs, validate_loading_arguments, validate_shared
from logitmix.mixture.frozen.references import same_model
from logitmix.mixture.opening import describe, first_line, open_model, validate_files
from logitmix.mixture.quantization import loading_kwargs, member_quantizations
from logitmix.mixture.tokenizers import declared_ends, end_token_ids, leave_texts_open

Member: TypeAlias = PreTrainedModel | str | os.PathLike[str]

OTHER_TOKENIZERS = "docs/family.md#members-with-other-tokenizers"

# The files of a tokenizer's vocabulary, under the names that transformers saves
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")


def load_members(
    sources: Sequence[Member], peft_config: PeftConfig | None = None, **kwargs: Any
) -> tuple[list[PreTrainedModel], dict[str, Any], PreTrainedTokenizerBase | None, list[int]]:
    """The model of each member, the adapters as in `LogitMixConfig`, the tokenizer that the members share, and every
    token with which one of them ends a completion.

    If the policy has an adapter, new (`peft_config`) or loaded, the anchors that are adapters on the same base, or
    that base itself, share its model. An anchor that is the policy's model object shares it in any case.

    Raises `ValueError` for a member that does not exist or is given twice, tokenizers that differ, and adapters that
    do not fit or have no effect.
    """
    _validate_sources(sources, peft_config)
    quantizations = member_quantizations(kwargs.pop("quantization_config", None), sources)
    validate_loading_arguments(kwargs, sources)
    options = member_kwargs(kwargs, sources)
    for name, quantization in quantizations.items():
        options[name] |= loading_kwargs(quantization)
    # Tokenizers first: they are small, and may rule out models that then need not load
    paths = [source.name_or_path if isinstance(source, PreTrainedModel) else str(source) for source in sources]
    trusted = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    tokenizers = [t for t in (load_tokenizer(path, **trusted) for path in paths if path) if t is not None]
    tokenizer = validate_same_tokenizer(tokenizers)
    _warn_of_other_templates(tokenizers)

    saved = [None if isinstance(source, PreTrainedModel) else read_adapter_config(str(source)) for source in sources]
    if peft_config is not None:
        validate_adapter_config(peft_config)
        if saved[0] is not None:
            raise ValueError(
                f"the policy {paths[0]!r} is an adapter already, but peft_config asks for a new one; leave out "
                "peft_config to continue training that adapter, or merge it into its base"
            )
    base = paths[0] if saved[0] is None else str(saved[0].base_model_name_or_path)
    if isinstance(sources[0], PreTrainedModel):
        policy = sources[0]
    else:
        given = options["policy"]
        policy = load_member(base, **given) if saved[0] is None else load_base(saved[0], paths[0], **given)
    has_adapter = peft_config is not None or saved[0] is not None
    if has_adapter and getattr(policy, "peft_config", None):
        raise ValueError("the policy has a PEFT adapter already; merge it, or pass the model without it")

    names = member_names(len(sources))
    members = [policy]
    adapters: dict[str, Any] = {}
    for name, source, path, config in zip(names[1:], sources[1:], paths[1:], saved[1:], strict=True):
        if has_adapter and config is not None and is_same_source(str(config.base_model_name_or_path), base):
            adapters[name] = add_adapter(policy, name, config, path)
        elif _is_policys_model(source, sources[0], base if has_adapter else None):
            adapters[name] = NO_ADAPTER
        if name in adapters:
            validate_shared(name, options[name], policy)
            if name in quantizations and "policy" not in quantizations:
                raise ValueError(
                    f"{name} shares the policy's weights, which are not quantised; leave out its quantisation"
                )
            members.append(policy)
        else:
            members.append(source if isinstance(source, PreTrainedModel) else load_member(path, True, **options[name]))
    if has_adapter:
        folder = None if saved[0] is None else paths[0]
        if peft_config is not None:
            validate_adapter_targets(policy, peft_config)
        adapters["policy"] = add_adapter(policy, "policy", saved[0] or copy.deepcopy(peft_config), folder)
    for name, path, config in zip(names, paths, saved, strict=True):
        if config is not None and adapters.get(name, NO_ADAPTER) != NO_ADAPTER:
            Adapters(policy, list(adapters)).validate_adapter_effect(name, path)
    _validate_members(members, tokenizer)
    ends = [end for member in members for end in declared_ends(member)]
    ends += [end for each in tokenizers for end in end_token_ids(each)]
    return members, adapters, tokenizer, list(dict.fromkeys(ends))


def _is_policys_model(anchor: Member, policy: Member, base: str | None) -> bool:
    """Whether the anchor is the policy's model, without the adapter on `base` that the policy may be.

    A model in memory only if it is the same object: its weights may have changed since loading. Without an adapter, a
    folder that is given twice is loaded twice, as the policy may train.
    """
    if isinstance(anchor, PreTrainedModel) or isinstance(policy, PreTrainedModel):
        return anchor is policy
    return base is not None and is_same_source(str(anchor), base)


def is_same_source(source: str, other: str) -> bool:
    """Whether two folders or hub ids are the same model: by name, or as copies of one another on this machine."""
    if source == other:
        return True
    folders = [_folder_of(source), _folder_of(other)]
    if None in folders:
        return False
    first, second = (Path(os.path.realpath(str(folder))) for folder in folders)
    return first == second or same_model(first, second)


def _folder_of(source: str) -> str | None:
    if os.path.isdir(source):
        return source
    try:
        return str(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _validate_sources(sources: Sequence[Member], peft_config: PeftConfig | None) -> None:
    for i, source in enumerate(sources):
        if not isinstance(source, (PreTrainedModel, str, os.PathLike)):
            raise ValueError(
                f"a member must be a model of transformers, a folder or a hub id, got {type(source).__name__}; to "
                "train a new adapter pass the plain model and peft_config=LoraConfig(…), to use a trained one its "
                "folder"
            )
        is_policy = source is sources[0]
        if isinstance(source, PreTrainedModel) and any(source is other for other in sources[:i]) and not is_policy:
            raise ValueError(
                "the same model object is given twice among the anchors; only with the policy, the first member, can "
                "anchors share their weights: pass it first, or copy.deepcopy(model)"
            )


def _warn_of_other_templates(tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Warn where an anchor was trained on chats that were rendered otherwise."""
    first, *others = tokenizers or [None]
    for other in others:
        if None not in (first.chat_template, other.chat_template) and first.chat_template != other.chat_template:
            warnings.warn(
                f"the chat templates of {first.name_or_path!r} and {other.name_or_path!r} differ; the first renders "
                "the chats of all members, so give both the template that the anchor was trained with",
                stacklevel=3,
            )


def _validate_members(members: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None) -> None:
    for member in members:
        if isinstance(member.config, LogitMixConfig):
            raise ValueError(
                "a member is itself a mixture; pass its members, model.policy and model.anchors, or load the mixture "
                "and set its weights"
            )
        if type(member).__module__.startswith("transformers_modules"):
            raise ValueError(
                f"the class of {describe(member)}, {type(member).__name__}, comes with the checkpoint "
                "(trust_remote_code), so a saved mixture could not be loaded; use an architecture that is in "
                "transformers"
            )
    for member in {id(member): member for member in members}.values():
        validate_architecture(member)
    vocab_size = min(member.config.get_text_config(decoder=True).vocab_size for member in members)
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but a member has logits for only {vocab_size}; "
            "the members' vocabularies may differ only in padding rows"
        )


def validate_can_be_loaded(config: LogitMixConfig) -> None:
    """Raise `ValueError` where a member's configuration, as it is saved, cannot be read again."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            LogitMixConfig.from_pretrained(folder)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        types = ", ".join(getattr(config, name).model_type for name in config.model_names)
        raise ValueError(
            f"transformers {transformers.__version__} cannot read the members' configurations ({types}) as they are "
            f"saved, so a saved mixture could not be loaded ({' '.join(str(error).split())}); use another architecture"
        ) from error


def load_member(source: str, is_anchor: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The model at `source`, checked as `open_model` says; an adapter is merged into its base.

    Raises `ValueError` if there is no model at `source`, or not all of it, and for an anchor's adapter without effect.
    """
    adapter = read_adapter_config(source)
    if adapter is not None:
        return merge_adapter(load_base(adapter, source, **kwargs), source, is_anchor)
    return open_model(source, **kwargs)


def load_base(adapter: LoraConfig, source: str, **kwargs: Any) -> PreTrainedModel:
    """The base model of the adapter at `source`."""
    try:
        return load_member(str(adapter.base_model_name_or_path), **kwargs)
    except ValueError as error:
        raise ValueError(
            f"the base of the adapter {source!r}, {adapter.base_model_name_or_path!r}, cannot be loaded; correct "
            f"base_model_name_or_path in its adapter_config.json ({error})"
        ) from error


def load_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, of an adapter without one that of its base; None if there is none.

    It appends nothing to texts, whatever the checkpoint says (`leave_texts_open`). Raises `ValueError` for a tokenizer
    that is there and cannot be read.
    """
    tokenizer = read_tokenizer(source, **kwargs)
    return None if tokenizer is None else leave_texts_open(tokenizer)


def read_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """As `load_tokenizer`, but as the checkpoint has it, which is how other programs load it."""
    adapter = read_adapter_config(source)
    if adapter is not None and not os.path.exists(os.path.join(source, "tokenizer_config.json")):
        return read_tokenizer(str(adapter.base_model_name_or_path), **kwargs)
    vocabulary = next((name for name in _VOCABULARIES if os.path.exists(os.path.join(source, name))), None)
    if vocabulary is not None:
        validate_files(source, *_VOCABULARIES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **({"trust_remote_code": False} | kwargs))
    except (OSError, ValueError, TypeError, LookupError) as error:
        if vocabulary is None:  # what transformers raises for a folder without tokenizer files
            return None
        raise ValueError(
            f"the tokenizer at {source!r} cannot be read ({type(error).__name__}: {first_line(error)}); save it again "
            "with tokenizer.save_pretrained(folder)"
        ) from error
    # or it returns one that has only special tokens
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def require_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises `ValueError` if there is none, or none that can pad a batch."""
    tokenizer = load_tokenizer(source, **kwargs)
    if tokenizer is not None:
        validate_padding(tokenizer)
        return tokenizer
    if not os.path.isdir(source):
        raise ValueError(
            f"no model at {source!r}: there is no such folder, and the hub could not provide the tokenizer of a model "
            "with that id; correct the path or the id"
        )
    if not os.path.exists(os.path.join(source, "config.json")) and read_adapter_config(source) is None:
        raise ValueError(f"no model at {source!r}: the folder has no config.json")
    raise ValueError(f"no tokenizer at {source!r}; save the model's there with tokenizer.save_pretrained(folder)")


def validate_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for a tokenizer with neither a padding token nor EOS, which would stand in for it."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has neither a padding token nor an EOS token, so "
            "completions would have no end and batches no padding; set tokenizer.eos_token and save it again"
        )


def validate_same_tokenizer(tokenizers: Sequence[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase | None:
    """Return the first tokenizer if all give the same ids to the same tokens; None if there are no tokenizers.

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
        tokens = {i: token for token, i in vocabulary.items()}
        other_tokens = {i: token for token, i in other_vocabulary.items()}
        i = min(i for i in tokens.keys() | other_tokens.keys() if tokens.get(i) != other_tokens.get(i))
        raise ValueError(
            f"the members' tokenizers differ: token {i} is {_quote(tokens.get(i))} in {first.name_or_path!r} and "
            f"{_quote(other_tokens.get(i))} in {other.name_or_path!r}; use members with the same tokenizer, or "
            f"first make them so: {OTHER_TOKENIZERS} says how, and at what cost"
        )
    return first


def _quote(token: str | None) -> str:
    return "missing" if token is None else repr(token)
