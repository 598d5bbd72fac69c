"""The sizes of a model, from its configuration alone."""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine its memory. `embedding` counts token embeddings and head, once if tied."""

    parameters: int
    embedding: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """The sizes of a model of this configuration, counted on the meta device without allocating memory."""
    return _model_shape(config.to_json_string())


@cache
def _model_shape(content: str) -> ModelShape:
    model = _on_meta(json.loads(content))
    text = model.config.get_text_config(decoder=True)
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=sum(p.numel() for p in embeddings),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
    )


def adapter_size(config: PreTrainedConfig, peft_config: PeftConfig) -> int:
    """The number of values that an adapter trains on a model of this configuration."""
    # a saved adapter is marked as one for inference, whose weights do not train
    model = get_peft_model(_on_meta(config.to_dict()), replace(peft_config, inference_mode=False))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _on_meta(config: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
