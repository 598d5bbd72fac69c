"""LoRA adapters of PEFT on one model: several members of a mixture whose base is in memory once.

Each adapter has the name of its member (`policy`, `anchor_0`, …). A member runs as the model with its adapter active,
or with no adapter.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import AuxiliaryTrainingWrapper, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from logitmix.mixture.configuration import NO_ADAPTER
from logitmix.mixture.opening import (
    describe,
    first_line,
    open_adapter,
    probe,
    read_adapter_weights,
    validate_adapter_loaded,
)
from logitmix.mixture.peft_patches import set_active_adapters
from logitmix.mixture.transformers_patches import mark_adapters_loaded, mark_initialized

_PREFIX = "base_model.model."  # of the weights' names in an adapter file
# Kept in float32 on a base in half precision, as PEFT creates and trains them
ADAPTER_WEIGHTS = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
# Initialisations that subtract from the base's weights, which other members and exports share
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNTESTED_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("use_bdlora", "use_qalora", "megatron_config", "target_parameters"),
)


def read_adapter_config(source: str) -> LoraConfig | None:
    """The configuration of the adapter at a folder or hub id; None if that is a model or does not exist.

    Raises `ValueError` for an adapter that a mixture cannot hold.
    """
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "config.json")):
        return None
    try:
        found = find_adapter_config_file(source)
    except (OSError, ValueError):
        return None
    if found is None:
        return None
    try:
        config = PeftConfig.from_pretrained(source)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"the adapter_config.json of {source!r} cannot be read ({type(error).__name__}: {first_line(error)}); "
            "correct it, or save the adapter again"
        ) from error
    validate_adapter_config(config, f"the adapter {source!r}")
    if not config.base_model_name_or_path:
        raise ValueError(
            f"the adapter {source!r} does not name its base model; set base_model_name_or_path in its "
            "adapter_config.json"
        )
    return config


def validate_adapter_config(config: PeftConfig, what: str = "peft_config") -> None:
    """Raise `ValueError` for an adapter that is no LoRA adapter, or changes the base that members share."""
    if not isinstance(config, PeftConfig):
        raise ValueError(f"{what} is a {type(config).__name__}; pass a LoraConfig of PEFT")
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{what} is of type {config.peft_type}; a member of a mixture can only be a LoRA adapter")
    variant = next((name for name in _UNTESTED_VARIANTS if getattr(config, name, None)), None)
    if variant is not None:
        raise ValueError(f"{what} sets {variant}, a variant of LoRA that mixtures are not tested with; leave it out")
    start = config.init_lora_weights
    for reason in (
        f"bias={config.bias!r} trains the base's own biases" if config.bias != "none" else None,
        "layer_replication changes the base's layers" if config.layer_replication else None,
        "trainable_token_indices changes the base's embeddings" if config.trainable_token_indices else None,
        f"init_lora_weights={start!r} subtracts from the base's weights"
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE)
        else None,
    ):
        if reason is not None:
            raise ValueError(f"{what} cannot be a member of a mixture: {reason}, which the members share")


def validate_adapter_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise `ValueError` if part of a new adapter would not train; PEFT ignores names that match no module."""
    if getattr(config, "lora_alpha", None) == 0:  # adapters other than LoRA, for a run without an anchor, have none
        raise ValueError("lora_alpha is 0, which scales the adapter to 0, so it would not train; set it above 0")
    paths = [path for path, _ in model.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        names = getattr(config, option, None)
        for name in [] if names is None or isinstance(names, str) else sorted(names):
            if not any(f".{path}".endswith(f".{name}") for path in paths):
                raise ValueError(
                    f"{name!r} in {option} is no module of {describe(model)}; correct it, or leave it out"
                )


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The paths and layers of the model that have adapters."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """The parameters of all adapters of a layer, without the base's."""
    return [parameter for adapters in _adapter_dicts(layer) for parameter in adapters.parameters()]


def has_adapter(layer: Any, name: str) -> bool:
    """Whether the layer has weights of the adapter `name`."""
    return any(name in adapters for adapters in _adapter_dicts(layer))


def _adapter_dicts(layer: Any) -> list[Any]:
    return [getattr(layer, attribute) for attribute in layer.adapter_layer_names]


def add_adapter(model: PreTrainedModel, name: str, config: LoraConfig, source: str | None = None) -> dict[str, Any]:
    """Add an adapter `name` to the model, new or with the weights at `source`; return its configuration as a dict.

    Its weights are float32 even if the model's are half precision, as in PEFT.

    Raises `ValueError` for an adapter that does not fit the model.
    """
    config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
    _validate_untied(model, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            inject_adapter_in_model(config, model, name)
    except ValueError as error:
        raise ValueError(f"the adapter of {name} does not fit {describe(model)}: {error}") from error
    for _, layer in adapter_layers(model):
        for adapters in _adapter_dicts(layer):
            for module in adapters.modules():
                mark_initialized(module)
    mark_adapters_loaded(model)
    cast_adapter_dtype(model, name)
    if source is not None:
        _load_adapter_weights(model, name, source)
    return adapter_config_to_dict(config)


def _load_adapter_weights(model: PreTrainedModel, name: str, source: str) -> None:
    weights = {key.removeprefix(_PREFIX): value for key, value in read_adapter_weights(source).items()}
    try:
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        raise ValueError(f"the adapter {source!r} does not fit {describe(model)}: {error}") from error
    missing = [key for key in loaded.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    validate_adapter_loaded(missing, loaded.unexpected_keys, source, model)


def merge_adapter(model: PreTrainedModel, source: str, is_anchor: bool = False) -> PreTrainedModel:
    """Merge the adapter at `source` into the model's weights; return the model in evaluation mode.

    An adapter that does not change the model's logits is refused as an anchor, and warned about otherwise.
    """
    adapted = open_adapter(model, source).eval()
    with adapted.disable_adapter():
        logits = probe(adapted)
    _validate_effect(logits, probe(adapted), source, is_anchor)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    merged.name_or_path = source
    merged.requires_grad_(True)  # PEFT froze it
    return merged.eval()


class Adapters:
    """The adapters of one model, of which at most one is active."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self.model = model
        self._layers = [layer for _, layer in adapter_layers(model)]
        # Of an adapter that it lacks, a LoRA layer ignores the name (and transformers reads the name there to save the
        # active adapter), but a copy of a module (modules_to_save) fails.
        self._active = {
            name: [
                [name] if isinstance(layer, BaseTunerLayer) or has_adapter(layer, name) else []
                for layer in self._layers
            ]
            for name in [*names, NO_ADAPTER]
        }

    def activate(self, name: str) -> None:
        """Make the adapter of the member `name` the active one; no adapter if it has none."""
        for layer, active in zip(self._layers, self._active[name], strict=True):
            set_active_adapters(layer, active)

    def train_only(self, name: str, requires_grad: bool = True) -> None:
        """Activate the adapter of the member `name`, and let it alone require gradients.

        Without adapters on any member, the model does.
        """
        self.model.requires_grad_(requires_grad and not self._layers)
        for layer in self._layers:
            for adapters in _adapter_dicts(layer):
                if name in adapters:
                    adapters[name].requires_grad_(requires_grad)
        self.activate(name)

    @contextmanager
    def as_member(self, name: str, then: str) -> Iterator[None]:
        """Within the context the model is the member `name` in evaluation mode.

        On exit the member `then` is active and every module is in the mode it had.
        """
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        self.activate(name)
        try:
            yield
        finally:
            self.activate(then)
            for module in training:
                module.training = True

    @torch.no_grad()
    def validate_adapter_effect(self, name: str, source: str) -> None:
        """Raise `ValueError` if the adapter of the member `name` does not change the model's logits.

        An adapter without effect is only warned about as the policy, which may start from an untrained one.
        """
        with self.as_member(NO_ADAPTER, then="policy"):
            base_logits = probe(self.model)
        with self.as_member(name, then="policy"):
            logits = probe(self.model)
        _validate_effect(base_logits, logits, source, is_anchor=name != "policy")


def _validate_effect(base_logits: Tensor, logits: Tensor, source: str, is_anchor: bool) -> None:
    if torch.equal(base_logits, logits):
        message = (
            f"the adapter {source!r} does not change the base's logits, as an untrained adapter does not; pass a "
            "trained adapter, or the base itself"
        )
        if is_anchor:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def adapter_config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """The configuration as JSON values, for `adapter_config_from_dict`."""
    values = {key: value for key, value in config.to_dict().items() if key != "runtime_config"}
    json_values: dict[str, Any] = json.loads(json.dumps(values, default=lambda value: sorted(value)))
    return json_values


def adapter_config_from_dict(values: dict[str, Any]) -> LoraConfig:
    return PeftConfig.from_peft_type(**values)


def _validate_untied(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise `ValueError` for an adapter on embeddings or a head that share one weight."""
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    names = {id(module): path for path, module in model.named_modules()}
    tied = {
        names[id(module)].rpartition(".")[2]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    adapted = tied & {target.rpartition(".")[2] for target in [*targets, *(config.modules_to_save or [])]}
    if adapted:
        raise ValueError(
            f"the adapter is on {sorted(adapted)[0]!r}, but {describe(model)} ties its embeddings to its head; "
            "leave them out of target_modules and modules_to_save"
        )
