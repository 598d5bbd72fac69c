"""The arguments that a run loads its models with."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOConfig

from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.dtypes import name_of


def resolve_init_kwargs(args: GRPOConfig, model: PreTrainedModel | str) -> dict[str, Any]:
    """The arguments that members are loaded with: `model_init_kwargs`, with TRL's defaults, and `dtype` by that name.

    Raises `ValueError` for a dtype that does not exist or is given twice, and where no model is loaded with them.
    """
    given = dict(args.model_init_kwargs or {})
    if given and not isinstance(model, str) and getattr(args, "anchor", None) is None:
        raise ValueError(
            f"model_init_kwargs is {given}, but the model is loaded already; load it with them, or pass its folder as "
            "the model"
        )
    if "torch_dtype" in given:  # the name of transformers before version 5
        dtype = given.pop("torch_dtype")
        if given.setdefault("dtype", dtype) != dtype:
            raise ValueError(
                f"model_init_kwargs has torch_dtype {dtype!r} and dtype {given['dtype']!r}; leave out one"
            )
    # TRL's default: float32 weights, under bf16 autocast
    resolved = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | given
    dtype = resolved["dtype"]
    if not (
        dtype in (None, "auto") or isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype)
    ):
        raise ValueError(f"dtype is {dtype!r} in model_init_kwargs; it must be float32, bfloat16, float16 or auto")
    return resolved


def member_dtypes(args: Any, policy_dtype: Any, model: PreTrainedModel | str) -> dict[str, Any]:
    """The dtypes that the members are loaded in, by their names.

    The anchor's is `anchor_dtype`. By default that is its checkpoint's; and the policy's where that has fewer bits,
    and for an adapter, which merging in half precision would round.
    """
    policy = name_of(policy_dtype)
    keeps_own = policy not in ("bfloat16", "float16") and read_adapter_config(args.anchor) is None
    default = "auto" if keeps_own else policy_dtype
    given = {} if isinstance(model, PreTrainedModel) else {"policy": policy_dtype}
    return given | {"anchor_0": args.anchor_dtype or default}


@contextmanager
def explained_init_kwargs(init_kwargs: dict[str, Any]) -> Iterator[None]:
    """Raise `ValueError` where a model's class does not know one of the arguments it is loaded with."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in init_kwargs:
            raise
        raise ValueError(
            f"model_init_kwargs has {unknown[1]!r}, which neither from_pretrained nor the model's configuration "
            "reads; correct it, or leave it out"
        ) from error
