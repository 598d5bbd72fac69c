"""Exporting one member of a mixture as a checkpoint that transformers or PEFT loads without logitmix."""

import copy
import os

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from logitmix.mixture.adapters import adapter_layers, has_adapter
from logitmix.mixture.base import MixtureBase
from logitmix.mixture.configuration import NO_ADAPTER
from logitmix.mixture.quantization import save_model
from logitmix.mixture.transformers_patches import mark_adapters_loaded


def export_member(mixture: MixtureBase, name: str, folder: str | os.PathLike[str], merge: bool = False) -> None:
    """Save one member alone: `"policy"`, `"anchor"`, or of several anchors `"anchor_0"`, …

    A member that is an adapter becomes a folder of PEFT that names its base. With `merge`, or if it is no adapter, it
    becomes a checkpoint of transformers. The mixture's tokenizer, if known, is saved with it.

    Raises `ValueError` for an unknown member, and for an adapter on a base that has no folder or hub id.
    """
    name = mixture.config.resolve_member_name(name)
    model: PreTrainedModel = getattr(mixture, mixture.config.model_of(name))
    adapter = mixture.config.adapters.get(name)
    if adapter is None or name in mixture.config.anchors_that_are_the_policy:
        save_model(model, folder)
    elif adapter == NO_ADAPTER or merge:
        merge_into_copy(model, name).save_pretrained(folder)
    elif not model.peft_config[name].base_model_name_or_path:
        raise ValueError(
            f"the adapter of {name} is on a model that was passed in memory, so the export cannot name its base; "
            "export it with merge=True"
        )
    else:
        with mixture.as_member(name):
            model.save_pretrained(folder)  # transformers saves the active adapter
    if mixture.tokenizer is not None:
        mixture.tokenizer.save_pretrained(folder)


def merge_into_copy(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A copy of the model without adapters, the adapter `name` (if it has one) merged into its weights.

    Weights that the adapter does not change are shared with the model.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return _without_adapters(copy.deepcopy(model, memo), name)


def share_base(model: PreTrainedModel) -> PreTrainedModel:
    """The model without adapters: other modules around the same parameters, which move and freeze with the model's."""
    return _without_adapters(copy.deepcopy(model, {id(p): p for p in model.parameters()}), NO_ADAPTER)


def _without_adapters(result: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model, whose layers become plain ones, the adapter `name` (if it has one) merged into their weights."""
    for path, layer in adapter_layers(result):
        if isinstance(layer, BaseTunerLayer):
            if has_adapter(layer, name):  # PEFT's layers of torchao look it up
                layer.merge(safe_merge=True, adapter_names=[name])  # safe: into a new tensor
            result.set_submodule(path, layer.get_base_layer())
        else:
            names = [name] if has_adapter(layer, name) else []
            layer.set_adapter(names)
            plain = layer.unload_and_optionally_merge_module(merge=bool(names), safe_merge=True, adapter_names=names)
            result.set_submodule(path, plain)
    if hasattr(result, "peft_config"):
        mark_adapters_loaded(result, False)
        del result.peft_config
    return result
