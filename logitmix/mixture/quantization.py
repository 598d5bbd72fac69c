"""Members with quantised weights: which quantisations there are, and how a mixture saves and opens such members.

A mixture saves a quantised member in a folder of its own, `anchor_0/`, as transformers saves that model: only the
model's quantizer knows how. The mixture's own files hold the weights of the other members.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from logitmix.mixture.adapters import read_adapter_config
from logitmix.mixture.configuration import LogitMixConfig, member_names
from logitmix.mixture.opening import first_line, open_model


def _int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _int4() -> TorchAoConfig:
    """Groups of 32. torchao packs two numbers into a byte on a GPU only; on a CPU each takes a byte."""
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if torch.cuda.is_available():
        return TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    int4: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(32)))


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


# by name: the package, and the configuration of transformers
NAMED: dict[str, tuple[str, Callable[[], QuantizationConfigMixin]]] = {
    "int8": ("torchao", _int8),
    "int4": ("torchao", _int4),
    "bitsandbytes-8bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes-4bit": ("bitsandbytes", _nf4),
}


def as_quantization(value: Any) -> QuantizationConfigMixin:
    """The quantisation of this name, or of this configuration of transformers: an object, a dict, or its JSON text.

    Raises `ValueError` for anything else, and where its package is not installed.
    """
    if isinstance(value, QuantizationConfigMixin):
        return value
    package, make = NAMED.get(value, (None, None)) if isinstance(value, str) else (None, None)
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"the quantisation {value!r} needs {package}, which is not installed; pip install {package}, or leave out "
            "the quantisation"
        )
    values = value
    try:
        if make is not None:
            return make()
        values = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
        if isinstance(values, Mapping):
            return AutoQuantizationConfig.from_dict(dict(values))
    except (ImportError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise ValueError(f"the quantisation {value!r} cannot be used: {first_line(error)}") from error
    raise ValueError(
        f"the quantisation is {value!r}; it must be {', '.join(NAMED)}, or a quantization_config of transformers as "
        'JSON, such as {"quant_method": "bitsandbytes", "load_in_8bit": true}'
    )


def member_quantizations(given: Any, sources: Sequence[Any]) -> dict[str, QuantizationConfigMixin]:
    """The quantisation of each member that is to have one, of `quantization_config`: one of all, or one by member.

    Raises `ValueError` for a name that is no member, and for a member that cannot be quantised as it is loaded.
    """
    names = member_names(len(sources))
    if given is None:
        return {}
    if not (isinstance(given, Mapping) and any(name in names for name in given)):
        quantization = as_quantization(given)
        loaded = zip(names, sources, strict=True)
        return {name: quantization for name, source in loaded if not isinstance(source, PreTrainedModel)}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"quantization_config names {unknown[0]!r}, which is no member; the members are {', '.join(names)}"
        )
    by_name = {name: as_quantization(value) for name, value in given.items() if value is not None}
    for name, source in zip(names, sources, strict=True):
        if name in by_name:
            validate_can_be_quantized(name, source)
    return by_name


def validate_can_be_quantized(name: str, source: Any) -> None:
    """Raise `ValueError` for a member that is loaded already, quantised already, or an adapter to be merged."""
    if isinstance(source, PreTrainedModel):
        raise ValueError(
            f"{name} is a loaded model, which is not quantised any more; load it with quantization_config, or pass "
            "its folder"
        )
    path = str(source)
    method = quantization_method(path)
    if method is not None:
        raise ValueError(f"{name} at {path!r} is quantised already, with {method}; leave out its quantisation")
    if name != "policy" and read_adapter_config(path) is not None:
        raise ValueError(
            f"{name} at {path!r} is an adapter, which would be merged into a quantised base and rounded there; merge "
            "it into a model first (PEFT's merge_and_unload), or leave out its quantisation"
        )


def quantization_method(source: str) -> str | None:
    """The method with which the checkpoint at a folder or hub id is quantised; None if it is not, or is no model."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return None
    found = values.get("quantization_config")
    return None if not found else str(found.get("quant_method", "an unknown method"))


def loading_kwargs(quantization: QuantizationConfigMixin) -> dict[str, Any]:
    """The arguments of `from_pretrained`: a GPU quantises faster, and some packings exist there alone."""
    device_map = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    return {"quantization_config": quantization, "device_map": device_map}


def plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a weight is made of: itself, or those inside one of torchao."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [tensor for name in names for tensor in plain_tensors(getattr(weight, name))]


def num_bytes(weight: Tensor) -> int:
    """The bytes that a weight takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in plain_tensors(weight))


# --- saving and opening ---------------------------------------------------------------------------------------------


def save_quantized(
    models: Mapping[str, PreTrainedModel], state: Mapping[str, Tensor], folder: str | os.PathLike[str], **kwargs: Any
) -> dict[str, Tensor]:
    """Save each of the quantised `models` that `state` has weights of in its folder; return the other weights."""
    rest = dict(state)
    for name, model in models.items():
        own = [key for key in rest if key.startswith(f"{name}.")]
        if own:
            save_model(model, Path(folder, name), **kwargs)
        for key in own:
            del rest[key]
    return rest


def save_model(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """`save_pretrained`, also of weights that were loaded quantised, whose names transformers cannot revert."""
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    model.save_pretrained(folder, **({"save_original_format": False} if is_quantized else {}), **kwargs)


def open_quantized(mixture: LogitMixConfig, source: Any, **kwargs: Any) -> dict[str, PreTrainedModel]:
    """The quantised members of the mixture at a folder or hub id, each from its own folder there."""
    subfolder, found = kwargs.get("subfolder") or "", {}
    options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    for name in mixture.quantized_models:
        if os.path.isdir(source):
            found[name] = open_model(os.path.join(source, subfolder, name))
        else:
            found[name] = open_model(str(source), subfolder=f"{subfolder}/{name}".lstrip("/"), **options)
    return found
