"""One member of a mixture as a checkpoint of its own, for transformers or PEFT without logitmix."""

import copy
import os

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from logitmix.mixture.adapters import NO_ADAPTER, adapter_layers
from logitmix.mixture.base import MixtureBase


def export_member(mixture: MixtureBase, name: str, folder: str | os.PathLike[str], merge: bool = False) -> None:
    """Save the member `name` (`"policy"`, `"anchor"`, of several `"anchor_0"`, …) alone, with the tokenizer if known.

    A member that is an adapter becomes a folder of PEFT, which names its base; with `merge`, or where it is no
    adapter, a checkpoint of transformers.

    Raises `ValueError` for a name that no member has, and for an adapter on a base that has no folder or hub id.
    """
    name = mixture.config.resolve_member_name(name)
    model: PreTrainedModel = getattr(mixture, mixture.config.model_of(name))
    record = mixture.config.adapters.get(name)
    if record is None:
        model.save_pretrained(folder)
    elif record == NO_ADAPTER or merge:
        merged(model, name).save_pretrained(folder)
    elif not model.peft_config[name].base_model_name_or_path:
        raise ValueError(
            f"the adapter of {name} is on a model that was given from memory, so an export could not say where its "
            "base is; export it merged"
        )
    else:
        with mixture.as_member(name):
            model.save_pretrained(folder)  # transformers saves the active adapter
    if mixture.tokenizer is not None:
        mixture.tokenizer.save_pretrained(folder)


def merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter of that name (if it has one) merged into its weights, and without any other.

    Weights that the adapter does not change are the model's own, not copies.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    result: PreTrainedModel = copy.deepcopy(model, memo)
    for path, layer in adapter_layers(result):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True, adapter_names=[adapter])  # safe: into a new tensor
            result.set_submodule(path, layer.get_base_layer())
        else:
            names = [adapter] if adapter in layer._get_available_adapters() else []
            layer.set_adapter(names)
            plain = layer.unload_and_optionally_merge_module(merge=bool(names), safe_merge=True, adapter_names=names)
            result.set_submodule(path, plain)
    result._hf_peft_config_loaded = False
    del result.peft_config
    return result
