"""The dtype of each member's weights. A frozen anchor can have fewer bits than the policy, which trains."""

import copy
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from logitmix.mixture.configuration import LogitMixConfig, member_names


def as_dtype(value: Any) -> torch.dtype:
    """The dtype of this name. Raises `ValueError` if there is none."""
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, name_of(value), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {value!r}; it must be float32, bfloat16, float16 or auto")
    return dtype


def name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def member_kwargs(kwargs: Mapping[str, Any], sources: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The arguments that each member is loaded with: a `dtype` by member is split, and is "auto" where it names none.

    Raises `ValueError` for a name that is no member, and for a loaded model of another dtype.
    """
    names, dtype = member_names(len(sources)), kwargs.get("dtype")
    if not isinstance(dtype, Mapping):
        return {name: dict(kwargs) for name in names}
    validate_members(dtype, names)
    for name, source in zip(names, sources, strict=True):
        _validate_loaded_dtype(name, source, dtype.get(name, "auto"))
    given = {name: dtype.get(name, "auto") for name in names}
    return {name: {**kwargs, "dtype": d if d == "auto" else as_dtype(d)} for name, d in given.items()}


def validate_loading_arguments(kwargs: Mapping[str, Any], sources: Sequence[Any]) -> None:
    """Raise `ValueError` for arguments of `from_pretrained` where every member is a loaded model already.

    They would have no effect, nor would a misspelt argument of the mixture. A dtype that the models have is no error.
    """
    if not all(isinstance(source, PreTrainedModel) for source in sources):
        return
    for key, value in kwargs.items():
        if key in ("dtype", "torch_dtype") and not isinstance(value, Mapping):
            for name, source in zip(member_names(len(sources)), sources, strict=True):
                _validate_loaded_dtype(name, source, "auto" if value is None else value)
        elif key not in ("dtype", "trust_remote_code") and value is not None:
            raise ValueError(
                f"{key}={reprlib.repr(value)} has no effect: it is an argument for loading members, which are loaded "
                "models already; leave it out, or pass folders"
            )


def _validate_loaded_dtype(name: str, source: Any, given: Any) -> None:
    if isinstance(source, PreTrainedModel) and given != "auto" and as_dtype(given) != source.dtype:
        raise ValueError(
            f"dtype of {name} is {name_of(given)}, but it is a loaded model in {name_of(source.dtype)}; convert it "
            "with model.to(dtype), or pass its folder"
        )


def validate_members(dtype: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `ValueError` for a dtype of something that is no member, or that does not exist."""
    for name, given in dtype.items():
        if name not in names:
            raise ValueError(f"dtype names {name!r}, which is no member; the members are {', '.join(names)}")
        if given != "auto":
            as_dtype(given)


def validate_shared(name: str, kwargs: Mapping[str, Any], policy: PreTrainedModel) -> None:
    """Raise `ValueError` if an anchor that runs on the policy's weights is to have another dtype."""
    given = kwargs.get("dtype")
    if given not in (None, "auto") and as_dtype(given) != policy.dtype:
        raise ValueError(
            f"dtype of {name} is {name_of(given)}, but it shares the policy's weights, which are "
            f"{name_of(policy.dtype)}; leave it out"
        )


def dtypes_of(members: Sequence[PreTrainedModel]) -> dict[str, str]:
    """For a mixture's configuration: the dtype of each anchor that differs from the policy's."""
    policy = members[0].dtype
    names = zip(member_names(len(members)), members, strict=True)
    return {name: name_of(m.dtype) for name, m in names if m.dtype != policy}


def with_member_dtypes(source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` of a mixture's `from_pretrained`, with the members' dtypes in the configuration where `dtype` is given.

    One dtype is for all members; of a dtype by member, a member that it does not name has the one it was saved in.
    """
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return kwargs
    kwargs = {key: value for key, value in kwargs.items() if key != "torch_dtype"}
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        del kwargs["dtype"]
        place = source if config is None else config
        config, kwargs = LogitMixConfig.from_pretrained(place, return_unused_kwargs=True, **kwargs)
    if isinstance(dtype, Mapping):
        validate_members(dtype, config.members)
        own = {name: given for name, given in dtype.items() if name != "policy" and given != "auto"}
        config.member_dtypes |= {name: name_of(as_dtype(given)) for name, given in own.items()}
        dtype = dtype.get("policy", "auto")
        if dtype not in (None, "auto"):  # the others are as they were saved, not as the policy is now
            saved = name_of(config.dtype)
            config.member_dtypes = {name: config.member_dtypes.get(name, saved) for name in config.model_names[1:]}
    else:
        config.member_dtypes = {}
    return kwargs | {"config": config, "dtype": dtype}


def is_mixture(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a mixture."""
    if not os.path.exists(os.path.join(source, "config.json")):
        return False
    values, _ = PreTrainedConfig.get_config_dict(source)
    return values.get("model_type") == LogitMixConfig.model_type
