"""Opening a checkpoint that refers to its frozen weights, in the copy of its run or in the members' own folders."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from logitmix.mixture.adapters import adapter_config_from_dict, add_adapter
from logitmix.mixture.configuration import NO_ADAPTER, LogitMixConfig
from logitmix.mixture.frozen.references import frozen_files, read_header, read_references, weight_files
from logitmix.mixture.frozen.sources import unchanged_source
from logitmix.mixture.frozen.store import read_store
from logitmix.mixture.loading import load_member
from logitmix.mixture.opening import open_model
from logitmix.mixture.quantization import as_quantization, loading_kwargs, open_quantized, quantization_method
from logitmix.mixture.transformers_patches import saved_state_dict


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
    path, options = unchanged_source(checkpoint, name, sources[name]), {"dtype": sources[name]["dtype"]}
    if name in config.quantized_models and quantization_method(path) is None:
        options |= loading_kwargs(as_quantization(getattr(config, name).quantization_config))
    model = load_member(path, **options)
    for member, adapter in config.adapters.items() if name == "policy" else ():
        if adapter != NO_ADAPTER:
            has_own = member in sources and member != "policy"  # otherwise the checkpoint holds it
            own = unchanged_source(checkpoint, member, sources[member]) if has_own else None
            add_adapter(model, member, adapter_config_from_dict(adapter), own)
    return model
