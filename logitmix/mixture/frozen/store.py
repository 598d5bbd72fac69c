"""Which weights of a mixture never train, and the one copy of them that the checkpoints of a run refer to.

Frozen are the anchors; and where the policy is an adapter, its base and the adapters of the anchors.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from logitmix.mixture.adapters import adapter_layers
from logitmix.mixture.base import MixtureBase
from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.frozen.references import (
    STORE,
    Weight,
    digests,
    fingerprints,
    frozen_files,
    read_header,
    sync,
    validate_fingerprints,
    weight_files,
)

POLICY = ("policy",)


def trained_state_dict(mixture: MixtureBase, changing: Sequence[str] = POLICY) -> dict[str, Tensor]:
    """The weights of the policy, or of the adapters of the members in `changing`, by their names in the mixture."""
    frozen = frozen_names(mixture, changing)
    return {name: weight for name, weight in mixture.state_dict().items() if name not in frozen}


def frozen_names(mixture: MixtureBase, changing: Sequence[str] = POLICY) -> set[str]:
    """The names of the weights in the mixture's state dict that are not in `trained_state_dict`."""
    names = set(mixture.state_dict())
    if "policy" not in mixture.config.adapters:
        return {name for name in names if not name.startswith("policy.")}
    adapters = {
        f"policy.{path}.{attribute}.{name}"
        for path, layer in adapter_layers(mixture.policy)
        for attribute in layer.adapter_layer_names
        for name in changing
    }
    modules = tuple(f"{adapter}." for adapter in adapters)
    return {name for name in names if name not in adapters and not name.startswith(modules)}


def owner_of(name: str, config: LogitMixConfig) -> str:
    """The frozen member that a weight belongs to, by the weight's name; `"policy"` for the base of its adapter."""
    model = name.partition(".")[0]
    if model != "policy":
        return model
    return next((a for a in config.adapters if f".{a}." in name or name.endswith(f".{a}")), "policy")


def save_store(mixture: MixtureBase, run: Path, staging: Path, changing: Sequence[str] = POLICY) -> dict[str, Any]:
    """Write the `frozen_names` to `run/frozen`, unless they are there already; return the reference to them.

    They are written to the folder `staging` first: a file in `run/frozen` is whole.
    """
    frozen = frozen_names(mixture, changing)
    state = {name: weight for name, weight in mixture.state_dict().items() if name in frozen}
    mixture.save_pretrained(staging, state_dict=state)
    quantized = [name for name in mixture.config.quantized_models if (staging / name).is_dir()]
    written = [path for each in ("", *quantized) for path in weight_files(staging / each) if path.exists()]
    weights = read_headers(written, mixture.config)
    known = digests(weights)
    sha256 = fingerprints(weights, lambda name: owner_of(name, mixture.config), known)
    key = fingerprints(weights, known=known)[""][:16]
    folder = run / STORE
    folder.mkdir(exist_ok=True)
    targets = {path: path.name.replace("model", key, 1) for path in written if path.parent == staging}
    for model in quantized:
        (folder / model).mkdir(exist_ok=True)
        targets |= {path: f"{model}/{path.name}" for path in (staging / model).iterdir()}
    files = {}
    for path, name in targets.items():
        files[name] = path.stat().st_size
        sync(path)
        os.replace(path, folder / name)
    for each in (*(folder / model for model in quantized), folder):
        sync(each)
    return {"files": files, "run": os.path.abspath(run), "sha256": sha256}


def read_store(checkpoint: Path, references: Mapping[str, Any], config: LogitMixConfig) -> dict[str, Path] | None:
    """The file of each frozen weight that a checkpoint refers to; None if they are in the members' own folders.

    Raises `ValueError` if they are missing, or a member has changed since it was stored.
    """
    files = frozen_files(checkpoint, references)
    if files is None:
        return None
    own = {name for path in weight_files(checkpoint) for name in read_header(path)}
    weights = {name: weight for name, weight in read_headers(files, config).items() if name not in own}
    found = fingerprints(weights, lambda name: owner_of(name, config))
    validate_fingerprints(found, references["store"]["sha256"], str(files[0]))
    quantized = config.quantized_models
    return {name: weight.path for name, weight in weights.items() if name.partition(".")[0] not in quantized}


def read_headers(files: Sequence[Path], config: LogitMixConfig) -> dict[str, Weight]:
    """The weights in these files, by their names in the mixture; a quantised member has files in its own folder."""
    weights: dict[str, Weight] = {}
    for path in files:
        if path.suffix == ".safetensors":
            prefix = f"{path.parent.name}." if path.parent.name in config.quantized_models else ""
            weights |= {prefix + name: weight for name, weight in read_header(path).items()}
    return weights
