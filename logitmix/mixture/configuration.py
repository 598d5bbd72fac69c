"""The configuration of a mixture: its members' configurations, their weights and the scheme."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from numbers import Integral
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from logitmix.mixture.context import validate_fits_context
from logitmix.mixture.member_configs import MemberConfigs
from logitmix.mixture.mixing import Plausibility, Scheme, Weights, alpha_to_weights, validate_weights
from logitmix.mixture.transformers_patches import Implementation, get_implementation

Alpha = float | Sequence[float] | Tensor
FORMAT_VERSION = 2
NO_ADAPTER = "off"  # the anchor that is the policy's model without an adapter
# Of a checkpoint with a plausibility cut or prompts of its members, which earlier versions of logitmix would leave out
FAMILY_VERSION = 2


def member_names(num_members: int) -> list[str]:
    """`["policy", "anchor_0", …]`, without bare integers, which vLLM reads in a weight's path as its layer."""
    return ["policy", *(f"anchor_{i}" for i in range(num_members - 1))]


class LogitMixConfig(MemberConfigs, PreTrainedConfig):
    """Configuration of a `LogitMixForCausalLM`: `z_mix = sum_k w_k z_k` over the policy and its anchors.

    Each member's configuration is an attribute with the member's name (`config.policy`, `config.anchor_0`), so that
    transformers treats it as a sub-configuration. `members` lists the names in the order of `weights`, because JSON
    sorts its keys.

    Args:
        members: names of the members, the policy first.
        weights: one weight per member, the default of a forward pass.
        scheme: `"logit"` (geometric mixture, eq. 1 of arXiv 2605.20555) or `"prob"` (arithmetic mixture).
        adapters: for each member that runs on the policy's model, the configuration of its LoRA adapter, or `"off"`
            for the model without an adapter. An anchor listed here has no model and no configuration of its own.
        plausibility: leave to the mixture only tokens whose probability under `plausibility_member` is at least this
            share of its most probable token's (`mixing.Plausibility`); None leaves all. See `set_plausibility`.
        plausibility_member: the name of that member.
        member_prompts: token ids that a member reads in `generate` instead of the prompt, by the member's name, where
            the call gives no prompts. See `set_member_prompts`.
        member_dtypes: the dtype of each anchor's weights that differs from the policy's, which is `dtype`.
        use_cache: whether a forward pass returns the KV cache by default.
        format_version: version of the checkpoint format.
    """

    model_type: ClassVar[str] = "logitmix"
    has_no_defaults_at_init: ClassVar[bool] = True

    members: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    scheme: Scheme = "logit"
    plausibility: float | None = None
    plausibility_member: str = "policy"
    member_prompts: dict[str, list[int]] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    member_dtypes: dict[str, str] = field(default_factory=dict)
    use_cache: bool = True
    format_version: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.members:
            raise ValueError(
                "a LogitMixConfig needs members; build a mixture of models with LogitMixForCausalLM.from_members"
            )
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format version {self.format_version}, but this logitmix reads versions up to "
                f"{FORMAT_VERSION}; install a newer logitmix"
            )
        missing = [name for name in self.model_names if name not in kwargs]
        if missing:
            raise ValueError(f"the configuration of member {missing[0]!r} is missing; found {sorted(kwargs)}")
        for name in self.model_names:
            config = kwargs.pop(name)
            setattr(self, name, config if isinstance(config, PreTrainedConfig) else _config_from_dict(config))
        self.set_weights(self.weights)
        self.set_plausibility(self.plausibility, self.plausibility_member)
        self.set_member_prompts(self.member_prompts)
        # By default each member keeps its own: transformers would overwrite it with the mixture's, which is None
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = self._get_implementations("attn_implementation")
        if kwargs.get("experts_implementation") is None:
            kwargs["experts_implementation"] = self._get_implementations("experts_implementation")
        super().__post_init__(**kwargs)

    @classmethod
    def from_member_configs(
        cls,
        configs: list[PreTrainedConfig],
        weights: Any = None,
        scheme: Scheme = "logit",
        adapters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "LogitMixConfig":
        """Configuration of the mixture of `configs`, the policy's first. With K = 2 alpha defaults to 0.5.

        The configuration of an anchor that shares the policy's model (`adapters=`) is ignored.
        """
        names, adapters = member_names(len(configs)), adapters or {}
        policy = configs[0].get_text_config(decoder=True)
        special_tokens = {key: getattr(policy, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(
            members=names,
            weights=resolve_weights(None, weights, len(configs), scheme).tolist(),
            scheme=scheme,
            **{name: c for name, c in zip(names, configs, strict=True) if name == "policy" or name not in adapters},
            adapters=adapters,
            **(special_tokens | kwargs),
        )

    def set_weights(self, weights: Weights) -> None:
        """Set the default weights of a forward pass, one per member."""
        checked = validate_weights(weights, len(self.members), self.scheme)
        if checked.dim() != 1:
            raise ValueError(
                f"the default weights of a mixture are {len(self.members)} numbers, got shape {list(checked.shape)}; "
                "pass weights for each sequence to forward or generate"
            )
        self.weights = checked.tolist()

    def set_plausibility(self, threshold: float | None, member: str = "policy") -> None:
        """Rule out the tokens whose probability under `member` is below `threshold` times its largest; None: none.

        Raises `ValueError` for a threshold outside (0, 1] and an unknown member.
        """
        checked = None if threshold is None else float(Plausibility(threshold).threshold)
        self.plausibility, self.plausibility_member = checked, self.resolve_member_name(member)
        self._set_format_version()

    def set_member_prompts(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Let members read these token ids in place of the prompts of `generate`, unless a call gives others.

        Raises `ValueError` for an unknown member, prompts of all members, and what is no prompt of the member.
        """
        if not isinstance(prompts, Mapping):
            raise ValueError(
                f"member_prompts is a {type(prompts).__name__}, but must be a dict of prompts by the names of "
                f"members: {', '.join(self.members)}"
            )
        named: dict[str, list[int]] = {}
        for given, values in prompts.items():
            name, ids = self.resolve_member_name(given), values.tolist() if hasattr(values, "tolist") else values
            if not isinstance(ids, (list, tuple)) or not all(isinstance(i, Integral) for i in ids):
                raise ValueError(
                    f"the prompt of {name} is {reprlib.repr(ids)}, but one to save is a list of token ids"
                )
            named[name] = [int(i) for i in ids]
            self.validate_prompt(name, named[name], f"the prompt of {name}", new_tokens=1)
        self.validate_some_read_the_prompt(named)
        self.member_prompts = named
        self._set_format_version()

    def validate_prompt(self, member: str, ids: Sequence[int], where: str, new_tokens: int) -> None:
        """Raise `ValueError` for a prompt that is empty, has other tokens than the mixture's, or exceeds the member's
        context together with `new_tokens`. The message names the prompt by `where`."""
        if not ids:
            raise ValueError(f"{where} is empty; it needs at least one token, such as BOS")
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise ValueError(f"{where} has a token id outside 0 to {self.vocab_size - 1}")
        context = self.context_lengths[self.members.index(member)]
        validate_fits_context(context, len(ids), new_tokens, where, of="the member's")

    def validate_some_read_the_prompt(self, own: Collection[str]) -> None:
        """Raise `ValueError` if all members have a prompt of their own."""
        if len(own) == len(self.members):
            raise ValueError(
                "member_prompts has a prompt for every member, so none would read input_ids; leave out one of them"
            )

    @property
    def display_names(self) -> list[str]:
        """The names of the members in tables and files, where the only anchor is `"anchor"`."""
        return ["policy", "anchor"] if len(self.members) == 2 else list(self.members)

    def require_one_prompt(self, user: str) -> None:
        """Raise `ValueError`, which names the `user`, if members have prompts of their own."""
        if self.member_prompts:
            raise ValueError(
                f"{user} gives all members the same tokens, but the mixture has a prompt of its own for "
                f"{', '.join(self.member_prompts)}; use generate or score, or config.set_member_prompts({{}})"
            )

    def _set_format_version(self) -> None:
        self.format_version = 1 if self.cut is None and not self.member_prompts else FAMILY_VERSION

    @property
    def cut(self) -> Plausibility | None:
        """The plausibility cut, for `mix_logits`. Raises `ValueError` for a threshold outside (0, 1]."""
        if self.plausibility is None:
            return None
        return Plausibility(self.plausibility, self.members.index(self.plausibility_member))

    def runs_without_adapter(self, member: str) -> bool:
        """Whether the member is its model as it is: of two such members on one model only the prompts can differ."""
        return self.adapters.get(member, NO_ADAPTER) == NO_ADAPTER

    @property
    def anchors_that_are_the_policy(self) -> list[str]:
        """The anchors that are the policy's own model, without an adapter on either."""
        return [] if "policy" in self.adapters else [name for name in self.members[1:] if name in self.adapters]

    def dtype_of(self, model: str) -> torch.dtype | None:
        """The dtype of the weights of a model in `model_names`."""
        name = self.member_dtypes.get(model)
        return self.dtype if name is None else getattr(torch, name)  # type: ignore[return-value]

    def resolve_member_name(self, name: str) -> str:
        """The name in `members`, of which `"anchor"` is short for the only anchor's.

        Raises `ValueError` for an unknown member.
        """
        if name == "anchor" and len(self.members) == 2:
            return self.members[1]
        if name not in self.members:
            raise ValueError(f"there is no member {name!r}; the members are {', '.join(self.members)}")
        return name

    def _get_implementations(self, kind: Implementation) -> dict[str, str | None]:
        return {name: get_implementation(getattr(self, name), kind) for name in self.model_names}


def resolve_weights(
    alpha: Alpha | None, weights: Weights | None, num_members: int, scheme: str, default: Weights | None = None
) -> Tensor:
    """The validated weights `[K]` or `[B, K]` from `alpha`, `weights` or else `default`.

    Without a default, alpha is 0.5 for one anchor, as in the paper; several anchors need weights.
    """
    if alpha is not None:
        if weights is not None:
            raise ValueError("pass alpha or weights, not both")
        if num_members != 2:
            raise ValueError(
                f"alpha is the weight of one anchor; {num_members} members need weights: leave alpha out where a "
                "checkpoint has them, or pass weights"
            )
        weights = alpha_to_weights(alpha)
    elif weights is None:
        weights = default
    if weights is None:
        if num_members != 2:
            raise ValueError(f"{num_members} members have no default weights; pass {num_members} weights")
        weights = alpha_to_weights(0.5)
    return validate_weights(weights, num_members, scheme)


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"a member has model type {model_type!r}, which transformers {transformers.__version__} does not support; "
            "install a version that does"
        )
    return AutoConfig.for_model(model_type, **values)
