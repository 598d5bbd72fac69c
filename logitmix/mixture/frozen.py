"""The weights of a mixture that never train: storing them once, and opening a checkpoint that refers to them.

Frozen are the anchors; and where the policy is an adapter, its base and the adapters of the anchors.
`logitmix.mixture.references` has the format.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from logitmix.mixture.adapters import (
    adapter_config_from_dict,
    adapter_layers,
    add_adapter,
    read_adapter_config,
)
from logitmix.mixture.base import MixtureBase
from logitmix.mixture.configuration import NO_ADAPTER, LogitMixConfig
from logitmix.mixture.dtypes import name_of
from logitmix.mixture.loading import load_member
from logitmix.mixture.opening import open_model
from logitmix.mixture.quantization import as_quantization, loading_kwargs, open_quantized, quantization_method
from logitmix.mixture.references import (
    STORE,
    Weight,
    digests,
    find_source,
    fingerprints,
    frozen_files,
    read_header,
    read_references,
    source_fingerprint,
    sync,
    validate_fingerprints,
    validate_source,
    weight_files,
)
from logitmix.mixture.transformers_patches import saved_state_dict

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


def describe_sources(mixture: MixtureBase, paths: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Where the frozen members were loaded from, `paths`, for `frozen.json`: with fingerprints and dtypes.

    Members that were passed in memory, and hub ids without files on this machine, are left out.
    """
    sources = {}
    for name, source in paths.items():
        fingerprint = fingerprint_of(source)
        if fingerprint is not None:
            dtype = name_of(getattr(mixture, mixture.config.model_of(name)).dtype)
            sources[name] = {"path": source, "sha256": fingerprint, "dtype": dtype}
    return sources


def relative_to(folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sources with their paths from `folder` too, None for hub ids: both may move together."""
    return {
        name: {**saved, "relative": os.path.relpath(saved["path"], folder) if os.path.isdir(saved["path"]) else None}
        for name, saved in sources.items()
    }


def without_source(mixture: MixtureBase) -> list[str]:
    """The frozen members that `describe_sources` leaves out."""
    config = mixture.config
    frozen = [name for name in config.members[1:] if config.adapters.get(name) != NO_ADAPTER]
    frozen += ["policy"] if "policy" in config.adapters else []
    return [name for name in frozen if name not in mixture.sources or folders_of(mixture.sources[name]) is None]


def frozen_sources(config: LogitMixConfig, sources: Sequence[Any]) -> dict[str, str]:
    """The folder or hub id of each frozen member, of those that the mixture was built from.

    A policy with an adapter has its base here; an anchor that is this base has nothing of its own.
    """
    found = {}
    for name, source in zip(config.members, sources, strict=True):
        adapter = config.adapters.get(name)
        if isinstance(source, PreTrainedModel) or adapter == NO_ADAPTER or (name == "policy" and adapter is None):
            continue
        path = str(source)
        saved = read_adapter_config(path) if name == "policy" else None
        path = path if saved is None else str(saved.base_model_name_or_path)
        found[name] = os.path.abspath(path) if os.path.isdir(path) else path
    return found


def fingerprint_of(source: str) -> str | None:
    """The fingerprint of the weights at a folder or hub id; of an adapter, with those of its base.

    None for a hub id without files on this machine.
    """
    folders = folders_of(source)
    return None if folders is None else source_fingerprint(folders)


def folders_of(source: str) -> list[Path] | None:
    """The folders of a model, or of an adapter and its base; None for a hub id without files on this machine."""
    folders = []
    while True:
        try:
            folder = source if os.path.isdir(source) else snapshot_download(source, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        folders.append(Path(folder))
        adapter = read_adapter_config(source)
        if adapter is None:
            return folders
        source = str(adapter.base_model_name_or_path)


def validate_sources(mixture: MixtureBase, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` if a frozen member was loaded from other weights than when the run began."""
    for name, saved in sources.items():
        source = mixture.sources.get(name)
        if source is not None:
            validate_source(name, source, fingerprint_of(source), saved["sha256"])


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


def open_frozen(
    checkpoint: Path, references: Mapping[str, Any] | None, config: LogitMixConfig
) -> dict[str, PreTrainedModel]:
    """The quantised members of a checkpoint, which refers to them, or holds them if `references` is None."""
    if references is None or not config.quantized_models:
        return open_quantized(config, checkpoint)
    files = frozen_files(checkpoint, references)
    if files is None:
        return {
            name: _load_source(checkpoint, references["sources"], config, name) for name in config.quantized_models
        }
    folders = {path.parent.name: path.parent for path in files}
    return {name: open_model(str(folders[name])) for name in config.quantized_models}


def load_with_references(
    load: Callable[..., Any], folder: Path, references: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """The mixture at a folder that refers to its frozen weights, and the loading info.

    `load` is transformers' `from_pretrained`, which takes all weights together. Raises `ValueError` if a frozen
    member is missing or has changed.
    """
    kwargs.pop("subfolder", None)
    config = kwargs.pop("config", None)
    if not isinstance(config, LogitMixConfig):
        config, kwargs = LogitMixConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    state = whole_state_dict(folder, references, config)
    trained = {} if "policy" not in config.quantized_models else {name: state.pop(name) for name in list(state)}
    model, info = load(None, *args, config=config, state_dict=state, output_loading_info=True, **kwargs)
    model.attach(open_frozen(folder, references, model.config))
    if trained:  # of an adapter on a quantised base
        model.load_state_dict({name: weight[:] for name, weight in trained.items()}, strict=False)
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def whole_state_dict(checkpoint: Path, references: Mapping[str, Any], config: LogitMixConfig) -> dict[str, Any]:
    """All weights of a checkpoint that refers to frozen ones. Those in files are not read yet."""
    state: dict[str, Any] = {}
    files = {name: path for path in weight_files(checkpoint) for name in read_header(path)}
    stored = read_store(checkpoint, references, config)
    if stored is None:
        state |= _load_from_sources(checkpoint, references["sources"], config)
    else:
        files |= stored
    handles: dict[Path, Any] = {path: safe_open(path, "pt") for path in set(files.values())}
    return state | {name: handles[path].get_slice(name) for name, path in files.items()}


def frozen_weights(checkpoint: Path, config: LogitMixConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights that a checkpoint refers to, one after another, by their names in its files; none if it is whole.

    Those in the members' own folders are loaded one member at a time, and have the names that saving gives them.
    Raises `ValueError` as `load_with_references`.
    """
    references = read_references(checkpoint)
    if references is None:
        return
    stored = read_store(checkpoint, references, config)
    if stored is None:
        own = {name for path in weight_files(checkpoint) for name in read_header(path)}
        for name in _referred_models(references["sources"], config):
            model = _load_source(checkpoint, references["sources"], config, name)
            weights = {f"{name}.{key}": weight for key, weight in saved_state_dict(model).items()}
            yield from ((key, weight) for key, weight in weights.items() if key not in own)
        return
    for path in dict.fromkeys(stored.values()):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it has no iterator
                if name in stored:
                    yield name, file.get_tensor(name)


def _load_from_sources(
    checkpoint: Path, sources: Mapping[str, Mapping[str, Any]], config: LogitMixConfig
) -> dict[str, Tensor]:
    """The frozen weights of a checkpoint, from the folders that its members were loaded from."""
    state: dict[str, Tensor] = {}
    for name in _referred_models(sources, config):
        model = _load_source(checkpoint, sources, config, name)
        state |= {f"{name}.{key}": weight for key, weight in model.state_dict().items()}
    return state


def _referred_models(sources: Mapping[str, Any], config: LogitMixConfig) -> list[str]:
    """The models that are loaded from `sources`. A policy that trains is there only if nothing has trained it yet."""
    return [
        name for name in config.model_names
        if name not in config.quantized_models and (name != "policy" or config.adapters or name in sources)
    ]  # fmt: skip


def _load_source(
    checkpoint: Path, sources: Mapping[str, Mapping[str, Any]], config: LogitMixConfig, name: str
) -> PreTrainedModel:
    """The model of a member, loaded as when the run began."""
    path, options = _find_source(checkpoint, name, sources[name]), {"dtype": sources[name]["dtype"]}
    if name in config.quantized_models and quantization_method(path) is None:
        options |= loading_kwargs(as_quantization(getattr(config, name).quantization_config))
    model = load_member(path, **options)
    for member, adapter in config.adapters.items() if name == "policy" else ():
        if adapter != NO_ADAPTER:
            has_own = member in sources and member != "policy"  # otherwise the checkpoint holds it
            own = _find_source(checkpoint, member, sources[member]) if has_own else None
            add_adapter(model, member, adapter_config_from_dict(adapter), own)
    return model


def _find_source(checkpoint: Path, name: str, saved: Mapping[str, Any]) -> str:
    """The folder or hub id of a frozen member. Raises `ValueError` if it has changed."""
    path = find_source(checkpoint, saved)
    assert path is not None, "frozen_files has found it"
    validate_source(name, path, fingerprint_of(path), saved["sha256"])
    return path
