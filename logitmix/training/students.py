"""The model that a distillation starts from: a member of the mixture, their merged weights, or another checkpoint."""

import copy
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from logitmix.mixture.adapters import read_adapter_config, validate_adapter_targets
from logitmix.mixture.export import merge_into_copy
from logitmix.mixture.loading import load_member, require_tokenizer, validate_same_tokenizer
from logitmix.mixture.merging import MERGED, merge_weights, set_merge
from logitmix.mixture.mixing import weights_to_alpha
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.student_adapters import adapter_on_member, is_member

_WAY_OUT = "start the student from policy or anchor"


def build_student(
    mixture: LogitMixForCausalLM,
    source: str = "policy",
    base_folder: str | None = None,
    peft_config: LoraConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """The student, with weights of its own, all of them trainable; with `peft_config`, a LoRA adapter that trains.

    An adapter is on the weights of the member that it starts from, which the mixture and the student then share, where
    `adapter_on_member` can do so, and else on a copy. Merge one that shares weights into a copy of them.

    Args:
        source: `"policy"`, `"anchor"` (of several `"anchor_0"`, …), `"merged"` for `(1 - alpha) θ_policy + alpha
            θ_anchor`, or a folder or hub id. A folder with such a name is written `./policy`.
        base_folder: where to save the student, and so the name of an adapter's base, if it has no folder of its own.
        peft_config: of the adapter, whose new weights are random: set a seed.
        kwargs: arguments of `from_pretrained`, for a folder or hub id.

    Raises `ValueError` for a checkpoint that does not exist, is a mixture, or has another tokenizer than the mixture,
    and for weights that cannot be merged.
    """
    shared = None if peft_config is None else adapter_on_member(mixture, source, peft_config, base_folder)
    if shared is not None:
        return shared
    if source == MERGED:
        student = _merged(mixture)
    elif is_member(mixture, source):
        student = _alone(mixture, mixture.config.resolve_member_name(source))
    else:
        student = _loaded(mixture, source, **kwargs)
    student.requires_grad_(True)
    if base_folder is not None and not student.name_or_path:
        student.save_pretrained(base_folder)
        if mixture.tokenizer is not None:
            mixture.tokenizer.save_pretrained(base_folder)
        student.name_or_path = base_folder
    if peft_config is None:
        return student
    validate_adapter_targets(student, peft_config)
    adapted = get_peft_model(student, copy.deepcopy(peft_config))
    assert isinstance(adapted, PeftModel)
    return adapted


def _alone(mixture: LogitMixForCausalLM, name: str) -> PreTrainedModel:
    """A copy of a member, its adapter merged into it."""
    model: PreTrainedModel = getattr(mixture, mixture.config.model_of(name))
    # copied again, since the first copy shares weights
    student = copy.deepcopy(merge_into_copy(model, name) if name in mixture.config.adapters else model)
    student.name_or_path = ""  # that of the model before its training, or of the adapter's base
    return student


def _merged(mixture: LogitMixForCausalLM) -> PreTrainedModel:
    config = mixture.config
    if len(config.members) != 2:
        raise ValueError(
            f"the student is 'merged', but the mixture has {len(config.members) - 1} anchors; {_WAY_OUT}_0"
        )
    if weights_to_alpha(config.weights) is None:
        raise ValueError(
            f"the student is 'merged', the average at alpha, but no alpha gives the mixture's weights "
            f"{config.weights}, which do not sum to 1; {_WAY_OUT}, or set alpha"
        )
    policy, anchor = (_alone(mixture, name) for name in config.members)
    student = merge_weights(policy, anchor, _WAY_OUT)
    set_merge(student, policy, anchor, mixture.alpha)
    return student


def _loaded(mixture: LogitMixForCausalLM, source: str, **kwargs: Any) -> PreTrainedModel:
    tokenizer = require_tokenizer(source, trust_remote_code=kwargs.get("trust_remote_code", False))
    if mixture.tokenizer is not None:
        validate_same_tokenizer([mixture.tokenizer, tokenizer])
    student = load_member(source, **kwargs)
    if isinstance(student, LogitMixForCausalLM):
        raise ValueError(
            f"the student {source} is a mixture; a student is one model: give policy, anchor, merged or a checkpoint"
        )
    if read_adapter_config(source) is not None:
        student.name_or_path = ""  # that of the base, into which the adapter is merged
    return student


def validate_student(student: Any, mixture: LogitMixForCausalLM) -> None:
    """Raise `ValueError` for a student that is no model, a mixture, or has modules of the mixture's in it."""
    if not isinstance(student, nn.Module):
        raise ValueError(
            f"the student is {student!r}, which is no model; load it with build_student(mixture, {student!r})"
        )
    if isinstance(student, LogitMixForCausalLM):
        raise ValueError("the student is a mixture; a student is one model, such as the mixture's policy")
    if _modules_with_weights(student) & _modules_with_weights(mixture):
        raise ValueError(
            "the student is a member of the mixture itself, which would change with it; give it modules of its own "
            'with build_student(mixture, "policy"), for an adapter with peft_config=…'
        )


def _modules_with_weights(model: nn.Module) -> set[int]:
    """The ids of the modules that have parameters of their own, beside those of modules inside."""
    return {id(module) for module in model.modules() if any(True for _ in module.parameters(recurse=False))}


def num_logits(student: PreTrainedModel) -> int:
    """The number of logits of a token, which may be more than the tokens of the vocabulary."""
    rows: int = student.config.get_text_config(decoder=True).vocab_size
    return rows


def validate_vocabulary(student: PreTrainedModel, mixture: LogitMixForCausalLM) -> None:
    """Raise `ValueError` for a student with fewer logits than the mixture has tokens."""
    rows, vocab_size = num_logits(student), mixture.config.vocab_size
    if rows < vocab_size:
        raise ValueError(
            f"the student has logits for {rows} tokens, and the mixture for {vocab_size}; use a student with the "
            "mixture's tokenizer"
        )
