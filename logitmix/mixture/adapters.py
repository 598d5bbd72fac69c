"""LoRA adapters of PEFT on one model: several members of a mixture on weights that are held once.

An adapter is named after its member (`policy`, `anchor_0`, …). Running a member means running the model while its
adapter is the active one, or none.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

NO_ADAPTER = "off"  # the anchor that is the policy's model without an adapter
_PREFIX = "base_model.model."  # of the names in an adapter's file
# Loaded in float32 beside a base in half precision, as PEFT creates and trains them
ADAPTER_WEIGHTS = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
# Ways to start an adapter that take a part out of the base's weights, which other members and exports rely on
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNTRIED = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("use_bdlora", "use_qalora", "megatron_config", "target_parameters"),
)
_PROBE_TOKENS = 8


def read_adapter_config(source: str) -> LoraConfig | None:
    """The configuration of the adapter at a folder or hub id, None where there is a model or nothing.

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
    config = PeftConfig.from_pretrained(source)
    validate_adapter_config(config, f"the adapter {source!r}")
    if not config.base_model_name_or_path:
        raise ValueError(f"the adapter {source!r} does not say which model it was made on (base_model_name_or_path)")
    return config


def validate_adapter_config(config: PeftConfig, what: str = "peft_config") -> None:
    """Raise `ValueError` for an adapter that would change what the members share, or is no LoRA."""
    if not isinstance(config, PeftConfig):
        raise ValueError(f"{what} is a {type(config).__name__}; give a LoraConfig of PEFT")
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{what} is of type {config.peft_type}; members of a mixture can be LoRA adapters only")
    start = config.init_lora_weights
    variant = next((name for name in _UNTRIED if getattr(config, name, None)), None)
    if variant is not None:
        raise ValueError(
            f"{what} has {variant} set, a variant of LoRA with which mixtures are not tested; leave it out"
        )
    for reason in (
        f"bias={config.bias!r} trains the base's own biases" if config.bias != "none" else None,
        "layer_replication changes the base's layers" if config.layer_replication else None,
        "trainable_token_indices changes the base's embeddings" if config.trainable_token_indices else None,
        f"init_lora_weights={start!r} takes a part out of the base's weights"
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)
        else None,
    ):
        if reason is not None:
            raise ValueError(f"{what} cannot be a member of a mixture: {reason}, and members share the base")


def validate_adapter_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise `ValueError` for a new adapter of which a part would not train; PEFT passes over unknown names."""
    if getattr(config, "lora_alpha", None) == 0:  # other kinds of adapter, without an anchor, have none
        raise ValueError("lora_alpha is 0, which scales the adapter to nothing, so that it would not train")
    paths = [path for path, _ in model.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        names = getattr(config, option, None)
        for name in [] if names is None or isinstance(names, str) else sorted(names):
            if not any(f".{path}".endswith(f".{name}") for path in paths):
                raise ValueError(f"{name!r} in {option} is no module of {_name(model)}; correct it, or leave it out")


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers of the model that hold adapters, and their paths."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """The parameters of all adapters of a layer; the base's are the others."""
    return [parameter for adapters in _adapter_dicts(layer) for parameter in adapters.parameters()]


def _adapter_dicts(layer: Any) -> list[Any]:
    return [getattr(layer, attribute) for attribute in layer.adapter_layer_names]


def add_adapter(model: PreTrainedModel, name: str, config: LoraConfig, source: str | None = None) -> dict[str, Any]:
    """Give the model an adapter under `name`, untrained or with the weights at `source`; returns its record.

    Its weights are float32 where the model's are of half precision, as in PEFT.

    Raises `ValueError` for an adapter that does not fit the model.
    """
    config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
    _require_untied(model, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(config, model, name)
    except ValueError as error:
        raise ValueError(f"the adapter of {name} does not fit {_name(model)}: {error}") from error
    for _, layer in adapter_layers(model):
        for adapters in _adapter_dicts(layer):
            for module in adapters.modules():
                module._is_hf_initialized = True  # or the mixture's `post_init` would draw these weights anew
    model._hf_peft_config_loaded = True  # what transformers goes by, in save_pretrained for instance
    cast_adapter_dtype(model, name)
    if source is not None:
        weights = {key.removeprefix(_PREFIX): value for key, value in load_peft_weights(source, device="cpu").items()}
        try:
            loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
        except RuntimeError as error:
            raise ValueError(f"the adapter {source!r} does not fit {_name(model)}: {error}") from error
        missing = [key for key in loaded.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
        if missing or loaded.unexpected_keys:
            raise ValueError(
                f"the adapter {source!r} does not fit {_name(model)}: "
                f"{len(missing)} of its weights are missing and {len(loaded.unexpected_keys)} have no place, "
                f"{(missing + list(loaded.unexpected_keys))[0]!r} for instance"
            )
    return adapter_config_to_dict(config)


def merge_adapter(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """The model with the adapter at `source` merged into its weights."""
    merged: PreTrainedModel = PeftModel.from_pretrained(model, source).merge_and_unload(safe_merge=True)
    merged.name_or_path = source
    merged.requires_grad_(True)  # PEFT froze it
    return merged.eval()


class Adapters:
    """The adapters of one model, of which one or none is active."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self.model = model
        self._layers = [layer for _, layer in adapter_layers(model)]
        # A layer of LoRA passes over an adapter that it does not have; a copy of a module (modules_to_save) does not.
        self._active = {
            name: [
                [name] if isinstance(layer, BaseTunerLayer) or name in layer._get_available_adapters() else []
                for layer in self._layers
            ]
            for name in [*names, NO_ADAPTER]
        }

    def activate(self, name: str) -> None:
        """Make the adapter of the member `name` the active one, or none where it has none.

        PEFT's own `set_adapter` makes what it activates trainable, and visits every weight: too much, twice a token.
        """
        for layer, active in zip(self._layers, self._active[name], strict=True):
            layer._active_adapter = active

    def train_only(self, name: str, requires_grad: bool = True) -> None:
        """Gradients for the adapter of the member `name`, for no other weight of the model; it becomes active."""
        self.model.requires_grad_(False)
        for layer in self._layers:
            for adapters in _adapter_dicts(layer):
                if name in adapters:
                    adapters[name].requires_grad_(requires_grad)
        self.activate(name)

    @contextmanager
    def as_member(self, name: str, then: str) -> Iterator[None]:
        """The model is the member `name`, without dropout; afterwards it is the member `then`, in the mode it had."""
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
        """Raise `ValueError` where the adapter leaves the model's logits as they are without one."""
        ids = torch.arange(1, 1 + _PROBE_TOKENS, device=self.model.device).unsqueeze(0)
        logits = []
        for member in (name, NO_ADAPTER):
            with self.as_member(member, then="policy"):
                logits.append(self.model(input_ids=ids, use_cache=False).logits)
        if torch.equal(*logits):
            raise ValueError(
                f"the anchor's adapter {source!r} changes nothing: with it the base gives the same logits as without "
                "it (an untrained adapter does). Give the trained one, or the base itself as the anchor"
            )


def adapter_config_to_dict(config: LoraConfig) -> dict[str, Any]:
    """The configuration as JSON has it; [`adapter_config_from_dict`] reads it back."""
    values = {key: value for key, value in config.to_dict().items() if key != "runtime_config"}
    record: dict[str, Any] = json.loads(json.dumps(values, default=lambda value: sorted(value)))
    return record


def adapter_config_from_dict(record: dict[str, Any]) -> LoraConfig:
    return PeftConfig.from_peft_type(**record)


def _name(model: nn.Module) -> str:
    return repr(model.name_or_path) if getattr(model, "name_or_path", None) else f"the {type(model).__name__}"


def _require_untied(model: PreTrainedModel, config: LoraConfig) -> None:
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    names = {id(module): path for path, module in model.named_modules()}
    ends = {
        names[id(module)].rpartition(".")[2]
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    touched = ends & {target.rpartition(".")[2] for target in [*targets, *(config.modules_to_save or [])]}
    if touched:
        raise ValueError(
            f"the adapter is on {sorted(touched)[0]!r}, but {_name(model)} ties its embeddings to its head; "
            "leave them out of target_modules and modules_to_save"
        )
