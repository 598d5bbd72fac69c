"""Flags that name a mixture: a checkpoint of one, or a policy and `--anchor`."""

from dataclasses import dataclass, field

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.cli.options.model import ModelArguments
from logitmix.mixture.configuration import resolve_weights
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.mixture.mixing import Scheme
from logitmix.mixture.modeling import LogitMixForCausalLM


@dataclass
class MixtureArguments:
    """The anchor to mix with, and how."""

    anchor: str | None = field(default=None, metadata={"help": "Mix the model with this anchor."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the anchor; default the checkpoint's, or 0.5 with --anchor."}
    )
    scheme: Scheme | None = field(
        default=None, metadata={"help": "How to mix; default the checkpoint's, or logit with --anchor."}
    )


def open_model(model_args: ModelArguments, args: MixtureArguments) -> PreTrainedModel:
    """The mixture of the model with `--anchor`, or the checkpoint itself, with `--alpha` and `--scheme` applied.

    Raises `ValueError` for an alpha or a scheme without an anchor.
    """
    source = model_args.model_name_or_path
    if args.anchor is not None:
        model: PreTrainedModel = LogitMixForCausalLM.from_members(
            source, args.anchor, args.alpha, scheme=args.scheme or "logit", **model_args.init_kwargs
        )
    else:
        model = load_member(source, **model_args.init_kwargs)
        for name, value in (("alpha", args.alpha), ("scheme", args.scheme)):
            if value is not None and not isinstance(model, LogitMixForCausalLM):
                raise ValueError(f"{name} is {value}, but {source} is not a mixture; give --anchor to mix it with")
        if isinstance(model, LogitMixForCausalLM):
            config = model.config
            config.scheme = args.scheme or config.scheme
            config.set_weights(
                resolve_weights(args.alpha, None, len(config.weights), config.scheme, default=config.weights)
            )
    return model.to(PartialState().device).eval()


def open_mixture(model_args: ModelArguments, args: MixtureArguments) -> LogitMixForCausalLM:
    """As `open_model`, for a mixture with one anchor. Raises `ValueError` for any other model."""
    model = open_model(model_args, args)
    if not isinstance(model, LogitMixForCausalLM):
        raise ValueError(
            f"{model_args.model_name_or_path} is not a mixture; give its anchor with --anchor, or a checkpoint of a "
            "mixture, as logitmix train saves it"
        )
    num_anchors = len(model.config.members) - 1
    if num_anchors != 1:
        raise ValueError(
            f"{model_args.model_name_or_path} has {len(model.members) - 1} anchors, but alpha weighs one; give the "
            "policy and one of them with --anchor"
        )
    return model


def open_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    return require_tokenizer(model_args.model_name_or_path)
