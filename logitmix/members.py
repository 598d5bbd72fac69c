"""The members of a mixture: opened, held against each other, and the anchors kept frozen."""

import os
from collections.abc import Sequence
from typing import Any, Self, TypeAlias

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logitmix.configuration import LogitMixConfig

Member: TypeAlias = PreTrainedModel | str | os.PathLike[str]


class HoldsMembers(PreTrainedModel):
    """What a model of a trainable policy and frozen anchors does otherwise than a single model.

    Its submodules are named by `config.members`, the policy first.
    """

    config: LogitMixConfig
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def members(self) -> list[PreTrainedModel]:
        """The policy, then the anchors, in the order of the weights."""
        return [getattr(self, name) for name in self.config.members]

    @property
    def anchors(self) -> list[PreTrainedModel]:
        return self.members[1:]

    def _freeze_anchors(self) -> None:
        for anchor in self.anchors:
            anchor.requires_grad_(False)
            anchor.eval()

    def train(self, mode: bool = True) -> Self:
        """Training mode for the policy; the anchors stay in evaluation mode (no dropout, no checkpointing)."""
        super().train(mode)
        for anchor in self.anchors:
            anchor.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Gradients for the policy; the anchors stay frozen."""
        self.policy.requires_grad_(requires_grad)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The policy's embeddings; those of the anchors stay as they are."""
        embeddings: nn.Module = self.policy.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.policy.set_input_embeddings(value)

    def get_output_embeddings(self) -> None:
        """None: no single matrix maps a hidden state to the mixture's logits."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("a mixture cannot resize its vocabulary; resize every member, then build the mixture")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the mixture: its two configurations, every member's weights, and the tokenizer if it is known."""
        if any(getattr(member, "_hf_peft_config_loaded", False) for member in self.members):
            # transformers would write the adapter's layers under names that it does not find again
            raise ValueError("a member has an adapter of PEFT; merge it, or save it with model.policy.save_pretrained")
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.tokenizer is not None and kwargs.get("is_main_process", True):
            self.tokenizer.save_pretrained(save_directory)


def open_members(
    sources: Sequence[Member], **kwargs: Any
) -> tuple[list[PreTrainedModel], PreTrainedTokenizerBase | None]:
    """The members, loaded where they are folders or hub ids, and the one tokenizer of those that have it beside them.

    Raises `ValueError` for a member that does not exist or is given twice, and for tokenizers that differ.
    """
    for i, source in enumerate(sources):
        if not isinstance(source, (PreTrainedModel, str, os.PathLike)):
            raise ValueError(
                f"a member is a model of transformers, a folder or a hub id, got {type(source).__name__}; for an "
                "adapter, build the mixture of the plain models, then get_peft_model(mixture, LoraConfig("
                r"target_modules=r'policy\..*_proj', …))"
            )
        if isinstance(source, PreTrainedModel) and any(source is other for other in sources[:i]):
            raise ValueError(
                "the same model object is given twice; freezing the anchor would freeze the policy with it. "
                "Load it twice, or pass copy.deepcopy(model) as the anchor"
            )
    # The tokenizers first: they are small, and what they rule out need not be loaded.
    paths = [source.name_or_path if isinstance(source, PreTrainedModel) else str(source) for source in sources]
    tokenizers = [load_tokenizer(path) for path in paths if path]
    tokenizer = require_same_tokenizer([t for t in tokenizers if t is not None])
    members = [
        source if isinstance(source, PreTrainedModel) else load_member(str(source), **kwargs) for source in sources
    ]
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
    return members, tokenizer


def load_member(source: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(source)`, or a `ValueError` of one sentence."""
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "config.json")):
        raise ValueError(f"no model at {source!r}: the folder has no config.json")
    try:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except OSError as error:
        raise ValueError(
            f"no model at {source!r}: it is neither a folder with a config.json and weights nor a model id that the "
            f"hub could be asked for ({_first_line(error)})"
        ) from error


def load_tokenizer(source: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None where it has none."""
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
        raise ValueError(
            f"there is no tokenizer at {source!r}; save the model's there, with tokenizer.save_pretrained(folder)"
        )
    return tokenizer


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
