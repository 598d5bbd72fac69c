"""A student that is a LoRA adapter on weights of the mixture: distilling then holds these weights once.

The student has modules of its own around the members' parameters, which neither of the two trains.
"""

import copy
import os
from math import isclose

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from logitmix.mixture.adapter_sums import set_to_sum
from logitmix.mixture.adapters import validate_adapter_config, validate_adapter_targets
from logitmix.mixture.export import share_base
from logitmix.mixture.frozen.sources import folders_of
from logitmix.mixture.merging import MERGED
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import num_bytes

_NEW = "default"  # PEFT's name of an adapter that it saves without a subfolder


def adapter_on_member(
    mixture: LogitMixForCausalLM, source: str, config: LoraConfig, base_folder: str | None = None
) -> PeftModel | None:
    """The student that starts from a member, or merged ones, as a new adapter on the member's own weights.

    It starts from a member that is itself an adapter, or from the average of such, if the new adapter can hold theirs
    (`set_to_sum`). None if it cannot, and for other sources: the student then needs weights of its own.

    A base without a folder on this machine is written to `base_folder`, so that the saved adapter can name it.
    """
    start = _start(mixture, source)
    try:
        validate_adapter_config(config)
    except ValueError:  # it changes the base
        return None
    if start is None:
        return None
    model, shares = start
    base = share_base(model)
    validate_adapter_targets(base, config)
    base.name_or_path = _name_on_disk(model)
    if not base.name_or_path and base_folder is not None:
        base.save_pretrained(base_folder)
        if mixture.tokenizer is not None:
            mixture.tokenizer.save_pretrained(base_folder)
        base.name_or_path = base_folder
    student = get_peft_model(base, copy.deepcopy(config), adapter_name=_NEW)
    assert isinstance(student, PeftModel)
    if shares:
        if config.init_lora_weights not in (True, "gaussian"):
            return None  # the new adapter would have an effect of its own
        try:
            set_to_sum(student.get_base_model(), _NEW, model, shares)
        except ValueError:
            return None
    return student


def shared_bytes(student: nn.Module, mixture: LogitMixForCausalLM) -> int:
    """The bytes of the parameters that the student and the mixture both hold."""
    held = {id(p) for p in mixture.parameters()}
    return sum(num_bytes(p) for p in student.parameters() if id(p) in held)


def is_member(mixture: LogitMixForCausalLM, source: str) -> bool:
    """Whether the source of a student is a member by its name, also where a folder has the same one."""
    return source in (*mixture.config.members, "anchor")


def _start(mixture: LogitMixForCausalLM, source: str) -> tuple[PreTrainedModel, dict[str, float]] | None:
    """The model whose weights the student shares, and the share of each of its adapters in the student's start."""
    config = mixture.config
    if source == MERGED:
        on_policy = [name for name in config.members if config.model_of(name) == "policy"]
        if len(config.members) != 2 or len(on_policy) != 2 or not isclose(sum(config.weights), 1):
            return None
        members = dict(zip(config.members, config.weights, strict=True))
    elif is_member(mixture, source):
        members = {config.resolve_member_name(source): 1.0}
    else:
        base = _name_on_disk(mixture.policy)
        is_base = base != "" and base == (os.path.realpath(source) if os.path.isdir(source) else source)
        return (mixture.policy, {}) if is_base else None
    (model,) = {config.model_of(name) for name in members}
    return getattr(mixture, model), {name: w for name, w in members.items() if not config.runs_without_adapter(name)}


def _name_on_disk(model: PreTrainedModel) -> str:
    """The folder or hub id of an adapter's base, if it is on this machine; a member that trained whole has none."""
    named = [config.base_model_name_or_path for config in getattr(model, "peft_config", {}).values()]
    name = str(named[0] or "") if named else ""
    folders = folders_of(name) if name else None
    if folders is None or len(folders) > 1:  # the base is an adapter itself
        return ""
    return os.path.realpath(name) if os.path.isdir(name) else name
