"""Opening a checkpoint: what is read from disk must be all that the model needs, or the checkpoint is refused.

transformers and PEFT only warn where a file lacks weights, and leave these at random values or without effect.
docs/mixture.md lists what is checked.
"""

import json
import os
import pickle
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from logitmix.mixture.torch_patches import avoid_weight_copies

# What reading a damaged file raises, besides OSError; other errors of the kind ValueError have a cause of their own
_UNREADABLE = (
    *(SafetensorError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError),
    *(json.JSONDecodeError, UnicodeDecodeError),
)
_PROBE_TOKENS = 8
_GIT_LFS = b"version https://git-lfs.github.com/spec"
_WRAPPERS = {
    "_orig_mod.": "the model was saved inside torch.compile",
    "module.": "the model was saved inside DistributedDataParallel",
    "base_model.model.": "the file is an adapter of PEFT, or the model was saved inside a PeftModel",
    "_fsdp_wrapped_module.": "the model was saved inside FSDP",
    "_checkpoint_wrapped_module.": "the model was saved inside a checkpoint wrapper",
}


def open_model(source: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained(source)`, if its files hold every weight of the model.

    Raises `ValueError` if there is no model at `source`, a file cannot be read, or a weight is missing or has another
    shape; warns about weights in the files that the model does not have.
    """
    if os.path.isdir(source):
        if not os.path.exists(os.path.join(source, "config.json")):
            raise ValueError(f"no model at {source!r}: the folder has no config.json")
        validate_files(source, "*.safetensors", "*.bin")
    options = {"trust_remote_code": False} | kwargs  # None would ask on the terminal
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except StrictDataclassError as error:
        raise ValueError(
            f"the config.json of {source!r} contradicts itself ({' '.join(str(error).split())}); correct it"
        ) from error
    except OSError as error:
        if os.path.isdir(source):
            raise _unreadable(source, error) from error
        raise ValueError(
            f"no model at {source!r}: it is neither a folder with a config.json and weights nor the id of a model "
            f"that the hub could provide ({first_line(error)})"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (*_UNREADABLE, ImportError, ValueError) as error:
        if _is_quantized(source, options):
            raise ValueError(
                f"the model at {source!r} cannot be held with quantised weights here ({type(error).__name__}: "
                f"{first_line(error)}); install what it needs, choose another quantisation, or do without"
            ) from error
        if not isinstance(error, _UNREADABLE):
            raise
        raise _unreadable(source, error) from error
    validate_loaded(info, source)
    avoid_weight_copies(model)
    _keep_unpacked(model)
    if options.get("quantization_config") is not None:
        unmap(model.parameters())
    return model


def unmap(weights: Iterable[Tensor]) -> None:
    """Copy weights on a CPU out of the file that they are mapped from, which one of them keeps in memory."""
    for weight in weights:
        if type(weight.data) is Tensor and weight.device.type == "cpu":
            weight.data = weight.data.clone()


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights in the first forward pass on a CPU.

    That rounds their scales to bfloat16, so that a saved model would differ from a loaded one, and fails where a size
    is not a multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_quantized(source: str, options: Mapping[str, Any]) -> bool:
    """Whether a model is saved, or is to be loaded, with quantised weights."""
    if options.get("quantization_config") is not None:
        return True
    own = {key: options[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in options}
    return bool(PreTrainedConfig.get_config_dict(source, **own)[0].get("quantization_config"))


def validate_files(folder: str, *patterns: str) -> None:
    """Raise `ValueError` for a file of these patterns that is empty, or a pointer of Git LFS instead of the file."""
    for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
        with path.open("rb") as file:
            start = file.read(len(_GIT_LFS))
        if not start:
            raise ValueError(f"{str(path)!r} is empty; copy or download it again")
        if start == _GIT_LFS:
            raise ValueError(f"{str(path)!r} is a pointer of Git LFS, not the file; fetch it with `git lfs pull`")


def validate_loaded(info: Mapping[str, Collection[Any]], source: str) -> None:
    """Raise `ValueError` where transformers' loading info names weights that were not loaded from `source`.

    Tied weights, and what an architecture declares to be computed, are not in it.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    # compressed-tensors also saves the shapes of weights that are not packed any more
    unexpected = [name for name in unexpected if not name.endswith(".weight_shape")]
    if missing:
        raise ValueError(
            f"the files at {source!r} lack {len(missing)} weights of the model, {missing[0]!r} first: "
            f"{_likely_cause(missing, unexpected)}"
        )
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{len(info['mismatched_keys'])} weights at {source!r} do not have the shape that its config.json gives "
            f"them: {key!r} is {list(found)}, and the model's is {list(expected)}; correct config.json, or save the "
            "model again"
        )
    if unexpected:
        warnings.warn(
            f"{len(unexpected)} weights at {source!r} are not used, {unexpected[0]!r} first: the model does not have "
            "them",
            stacklevel=2,
        )


def open_adapter(base: PreTrainedModel, source: str, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained(base, source)`, if the adapter's file and its modules have the same weights.

    Raises `ValueError` otherwise.
    """
    read_adapter_weights(source)
    config = PeftConfig.from_pretrained(source)
    config.inference_mode = not is_trainable
    try:
        model = PeftModel(base, config)
        loaded = model.load_adapter(source, "default", is_trainable=is_trainable)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, *_UNREADABLE) as error:
        raise ValueError(f"the adapter {source!r} does not fit {describe(base)}: {first_line(error)}") from error
    validate_adapter_loaded(loaded.missing_keys, loaded.unexpected_keys, source, base)
    return model


def read_adapter_weights(source: str) -> dict[str, Tensor]:
    """The weights in the file of an adapter, by their names there.

    Raises `ValueError` if the file cannot be read, or holds a weight that is not finite.
    """
    if os.path.isdir(source):
        validate_files(source, "adapter_model.*")
    try:
        weights: dict[str, Tensor] = load_peft_weights(source, device="cpu")
    except (OSError, *_UNREADABLE) as error:
        raise ValueError(
            f"the adapter {source!r} cannot be read ({type(error).__name__}: {first_line(error)}); copy or download "
            "it again"
        ) from error
    broken = sorted(name for name, weight in weights.items() if not weight.isfinite().all())
    if broken:
        raise ValueError(
            f"{len(broken)} weights of the adapter {source!r} are not finite, {broken[0]!r} first: its training "
            "diverged, or the file is damaged; use an earlier checkpoint"
        )
    return weights


def validate_adapter_loaded(
    missing: Collection[str], unexpected: Collection[str], source: str, base: PreTrainedModel
) -> None:
    """Raise `ValueError` where weights of an adapter's file or of its modules were left over in loading it."""
    if missing or unexpected:
        raise ValueError(
            f"the adapter {source!r} does not fit {describe(base)}: {len(missing)} weights are missing and "
            f"{len(unexpected)} are unexpected, {[*missing, *unexpected][0]!r} for example"
        )


@torch.no_grad()
def probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """The model's logits at a few tokens, which tell whether an adapter changes them."""
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device).unsqueeze(0)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _unreadable(source: str, error: Exception) -> ValueError:
    return ValueError(
        f"the model at {source!r} cannot be read ({type(error).__name__}: {first_line(error)}); copy or download it "
        "again"
    )


def describe(model: nn.Module) -> str:
    """The folder or hub id of a model, or its class."""
    return repr(model.name_or_path) if getattr(model, "name_or_path", None) else f"the {type(model).__name__}"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _likely_cause(missing: list[str], unexpected: list[str]) -> str:
    for wrapper, cause in _WRAPPERS.items():
        if any(wrapper in key for key in unexpected):
            return f"they are there with {wrapper!r} in their names, since {cause}; save the inner model"
    if unexpected:
        return f"the file has others in their place, such as {unexpected[0]!r}; is it another architecture's?"
    layers = [key for key in missing if ".layers." in key or ".h." in key]
    if len(layers) == len(missing):
        return "whole layers are absent; does its config.json give more layers than were saved?"
    return "the files are incomplete; copy or download them again"
