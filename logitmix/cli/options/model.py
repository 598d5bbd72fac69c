"""Flags for the model of a command: a checkpoint, or a policy and `--anchor`; and loading what they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from logitmix.mixture.modeling import LogitMixForCausalLM

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(kw_only=True)
class LoadingArguments:
    """Loading"""

    dtype: Dtype = field(default="float32", metadata={"help": "Dtype of the weights; auto: the checkpoint's own."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation: sdpa, eager, flash_attention_2, ..."}
    )

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}

    def with_init_kwargs(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """`init_kwargs` with those of `--model_init_kwargs` over them; `torch_dtype` is `dtype`.

        Raises `ValueError` where `--dtype` and `--model_init_kwargs` name two dtypes.
        """
        given = dict(given or {})
        for name in ("torch_dtype", "dtype"):
            if name in given and self.dtype not in ("float32", given[name]):
                raise ValueError(
                    f"--dtype is {self.dtype}, and {name} {given[name]!r} in --model_init_kwargs; leave out one"
                )
        flags = self.init_kwargs
        if "torch_dtype" in given:
            del flags["dtype"]
        return flags | given


@dataclass(kw_only=True)
class ModelArguments(LoadingArguments):
    """Model"""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model; of the policy, in training."})

    def __post_init__(self) -> None:
        self.model_name_or_path = find_model(self.model_name_or_path)


@dataclass
class AnchorArguments:
    """Mixture"""

    anchor: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the anchor to mix the model with."}
    )

    def __post_init__(self) -> None:
        if self.anchor is not None:
            self.anchor = find_model(self.anchor)


@dataclass
class MixtureArguments(AnchorArguments):
    """Mixture"""

    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the anchor; default: the checkpoint's, or 0.5 with --anchor."}
    )
    scheme: Literal["logit", "prob"] | None = field(
        default=None,
        metadata={"help": "How members are mixed; default: the checkpoint's, or logit with --anchor."},
    )


def find_model(source: str) -> str:
    """The model at a folder or hub id; of a run that has not saved its model yet, the last complete checkpoint."""
    from logitmix.runs.console import console
    from logitmix.training.checkpointing.folders import last_whole_checkpoint

    folder = Path(source)
    if not folder.is_dir() or any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        return source
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        return source
    console.print(
        f"{source} is a run that has not finished; its last checkpoint, {checkpoint.name}, is used.", soft_wrap=True
    )
    return str(checkpoint)


def load_model(model_args: ModelArguments, mixture_args: MixtureArguments) -> PreTrainedModel:
    """The mixture of the model with `--anchor`, or the checkpoint itself, at `--alpha` and with `--scheme`.

    Raises `ValueError` for an alpha or a scheme without anything to mix with.
    """
    from accelerate import PartialState

    from logitmix.mixture.configuration import resolve_weights
    from logitmix.mixture.loading import load_member
    from logitmix.mixture.modeling import LogitMixForCausalLM

    source, alpha, scheme = model_args.model_name_or_path, mixture_args.alpha, mixture_args.scheme
    if mixture_args.anchor is not None:
        model: PreTrainedModel = LogitMixForCausalLM.from_members(
            source, mixture_args.anchor, alpha, scheme=scheme or "logit", **model_args.init_kwargs
        )
    else:
        model = load_member(source, **model_args.init_kwargs)
        for name, value in (("alpha", alpha), ("scheme", scheme)):
            if value is not None and not isinstance(model, LogitMixForCausalLM):
                raise ValueError(f"{name} is {value}, but {source} is not a mixture; add --anchor to mix it with")
        if isinstance(model, LogitMixForCausalLM):
            config = model.config
            config.scheme = scheme or config.scheme
            config.set_weights(
                resolve_weights(alpha, None, len(config.weights), config.scheme, default=config.weights)
            )
    return model.to(PartialState().device).eval()


def require_mixture(model: PreTrainedModel, source: str) -> LogitMixForCausalLM:
    """The model that was loaded from `source`. Raises `ValueError` if it is not a mixture."""
    from logitmix.mixture.modeling import LogitMixForCausalLM

    if not isinstance(model, LogitMixForCausalLM):
        raise ValueError(
            f"{source} is not a mixture; give its anchor with --anchor, or give the checkpoint of a mixture, as "
            "logitmix train saves it"
        )
    return model


def load_mixture(model_args: ModelArguments, mixture_args: MixtureArguments) -> LogitMixForCausalLM:
    """As `load_model`, for a mixture with one anchor. Raises `ValueError` for anything else."""
    model = require_mixture(load_model(model_args, mixture_args), model_args.model_name_or_path)
    num_anchors = len(model.config.members) - 1
    if num_anchors != 1:
        raise ValueError(
            f"{model_args.model_name_or_path} has {num_anchors} anchors, but alpha is the weight of one; give the "
            "policy and one of them with --anchor, or sweep the weights of all with logitmix sweep --weights simplex"
        )
    return model


def load_several(model_args: ModelArguments, members: Sequence[str]) -> LogitMixForCausalLM:
    """The mixture of the model and other members, at equal weights; without others, the saved mixture itself.

    Raises `ValueError` for a checkpoint that is not a mixture where there are no other members, and is one where there
    are.
    """
    from accelerate import PartialState

    from logitmix.mixture.loading import load_member
    from logitmix.mixture.modeling import LogitMixForCausalLM
    from logitmix.mixture.presets import ensemble

    source = model_args.model_name_or_path
    if members:
        model: PreTrainedModel = ensemble([source, *members], **model_args.init_kwargs)
    else:
        model = load_member(source, **model_args.init_kwargs)
    if not isinstance(model, LogitMixForCausalLM):
        raise ValueError(f"{source} is not a mixture; give the members after it with --members")
    return model.to(PartialState().device).eval()
