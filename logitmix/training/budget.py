"""Estimates, before anything is loaded, the rollouts and updates of a run, and its memory on each device.

Sizes are those of a decoder like Qwen2 (grouped-query attention, a gated MLP, RMS norms) with SDPA or flash attention.
`weight` and `compute` are the bytes per number of weights and of matrix products: 4 and 2 for float32 weights under
bf16 autocast, otherwise equal.

Weights, gradients and AdamW's moments are exact. The rest counts the tensors that PyTorch keeps, and
tests/training/test_budget.py compares it with them. The CUDA context and fragmentation are not counted.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from logitmix.loss_head.chunking import CHUNK_BYTES

# tile of TRL's fused head: tokens x rows of the vocabulary
_TILE_TOKENS, _TILE_ROWS = 4096, 32768

Phase = Literal["always", "sampling", "update"]


@dataclass(frozen=True)
class Batches:
    """TRL's batch sizes, and the totals over all processes; `rows` is per_device_train_batch_size."""

    rows: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int
    processes: int

    @property
    def rollouts_per_update(self) -> int:
        return self.rows * self.gradient_accumulation_steps * self.processes

    @property
    def rollouts_per_outer_step(self) -> int:
        """The number of rollouts in an outer step."""
        return self.rows * self.steps_per_generation * self.processes

    @property
    def updates_per_outer_step(self) -> float:
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    def updates_in(self, questions: int) -> int:
        """Updates in one pass over the questions; those that do not fill an outer step are left out."""
        outer_steps = questions * self.num_generations // self.rollouts_per_outer_step
        return int(outer_steps * self.updates_per_outer_step)


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


@dataclass(frozen=True)
class Setup:
    """The settings of a run that determine its memory.

    members:   the policy, and the anchor if there is one; both run in every forward pass
    reference: the frozen model of a KL term, which is not sampled
    anchor_weight: bytes per number of the anchor's weights; 0 for as many as the policy's
    reference_adapter: whether that model is instead a frozen copy of the adapter on the policy's base
    rows:      sequences in a forward pass with gradients
    sampled:   rollouts sampled at a time; 0 in SFT
    processes: one on each device
    sharded:   whether processes shard weights, gradients and moments (FSDP, ZeRO-3) or hold copies (DDP)
    adapter:   float32 numbers of the LoRA adapter that is trained instead of the policy; 0 for none
    one_base:  whether the anchor is the policy's model with another adapter, or without
    """

    members: tuple[ModelShape, ...]
    reference: ModelShape | None
    weight: int
    compute: int
    rows: int
    sampled: int
    prompt: int
    completion: int
    checkpointing: bool
    processes: int
    sharded: bool
    adapter: int = 0
    one_base: bool = False
    anchor_weight: int = 0
    reference_adapter: bool = False

    @property
    def weights(self) -> list[int]:
        """Bytes per number of each member's weights."""
        return [self.weight, *(self.anchor_weight or self.weight for _ in self.members[1:])]

    @property
    def length(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Part:
    """A part of a device's memory, in bytes, and the phase that needs it."""

    name: str
    size: float
    phase: Phase


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


def layer_bytes(setup: Setup) -> int:
    """Bytes kept for the backward pass of one layer of the policy.

    Each of the two norms keeps its input (in float32), the normalised values, and its output, which matrix products
    read: in `weight`, or under autocast as a copy for each of the five products. Attention keeps queries, keys and
    values repeated to all heads, its output twice (once for the next product), and a mask per sequence. The MLP keeps
    four tensors of the intermediate size.
    """
    policy, weight, compute = setup.members[0], setup.weight, setup.compute
    outputs = 5 * compute if compute < weight else 2 * weight
    norms = policy.hidden * (2 * 4 + 2 * weight + outputs)
    token = norms + compute * (5 * policy.heads * policy.head_size + 4 * policy.intermediate)
    return setup.rows * setup.length * (token + setup.length * compute)


def activation_bytes(setup: Setup) -> int:
    """Bytes kept for the backward pass of the policy's decoder, and the gradients of the current layer.

    Without checkpointing that is every layer; with it, the layers' inputs and one layer that is recomputed.
    """
    policy, layer = setup.members[0], layer_bytes(setup)
    if not setup.checkpointing:
        return (policy.layers + 1) * layer
    return setup.rows * setup.length * policy.layers * setup.weight * policy.hidden + 2 * layer


def kv_cache_bytes(shape: ModelShape, tokens: int, weight: int) -> int:
    """Bytes of the keys and values of all layers, which keep the dtype of the weights under autocast."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * tokens * weight


def head_bytes(setup: Setup) -> int:
    """Bytes of the loss, from the last hidden states on.

    For a mixture, the fused loss head holds a chunk of logits and its results; for a single model, TRL's holds a tile.
    Both compute the gradients of the head and of the hidden states in float32.
    """
    policy, vocabulary = setup.members[0], min(shape.vocabulary for shape in setup.members)
    tokens = setup.rows * (setup.completion if len(setup.members) > 1 else setup.length)
    if len(setup.members) > 1:
        logits = 2 * min(4 * tokens * vocabulary, CHUNK_BYTES["cuda"])
    else:
        logits = min(tokens, _TILE_TOKENS) * min(vocabulary, _TILE_ROWS) * setup.compute
    rows = tokens if setup.adapter else vocabulary + tokens  # with an adapter the head is frozen
    return logits + 4 * policy.hidden * rows


def memory(setup: Setup) -> list[Part]:
    """The parts of a device's memory; see `peak` for their maximum."""
    policy, shares = setup.members[0], setup.processes if setup.sharded else 1
    trained = (setup.adapter * 4 if setup.adapter else policy.parameters * setup.weight) / shares
    frozen = () if setup.one_base else setup.members[1:]
    parts = [
        Part("policy's weights", policy.parameters * setup.weight / shares, "always"),
        *(Part("anchor's weights", s.parameters * setup.weights[1] / shares, "always") for s in frozen),
        Part("AdamW's two moments", 2 * trained, "always"),
        Part("gradients", trained, "update"),
        Part("activations", activation_bytes(setup), "update"),
        Part("logits and loss", head_bytes(setup), "update"),
    ]
    if setup.adapter:
        parts.insert(1, Part("adapter", trained, "always"))
    if setup.reference is not None:
        parts.insert(1, Part("reference's weights", setup.reference.parameters * setup.weight / shares, "always"))
    if setup.reference_adapter:
        parts.insert(2, Part("reference: a frozen copy of the adapter", trained, "always"))
    if setup.processes > 1 and not setup.sharded:
        parts.append(Part("gradients, to exchange", trained, "update"))
    if setup.sampled:
        parts += _sampling(setup)
    copies = _weight_copies(setup)
    phases: tuple[Phase, ...] = ("sampling", "update") if setup.sampled else ("update",)
    return parts + [Part(name, size, phase) for name, size in copies.items() for phase in phases]


def _sampling(setup: Setup) -> list[Part]:
    tokens, vocabulary = setup.sampled * setup.length, setup.members[0].vocabulary
    # during prefill, of one layer: three tensors of the MLP, the residual and its norm
    prompts = max(3 * s.intermediate * setup.compute + 3 * s.hidden * setup.weight for s in setup.members)
    # logits of each member, and of the mixture: mixed, scaled, and as probabilities
    logits = setup.sampled * vocabulary * 4 * (len(setup.members) + 3)
    cache = sum(kv_cache_bytes(s, tokens, w) for s, w in zip(setup.members, setup.weights, strict=True))
    return [
        Part("KV cache", cache, "sampling"),
        Part("prompts in a layer", setup.sampled * setup.prompt * prompts, "sampling"),
        Part("next token's logits", logits, "sampling"),
    ]


def _weight_copies(setup: Setup) -> dict[str, float]:
    """Copies of weights: under autocast a forward pass keeps a cast copy of trained ones; sharding gathers two layers
    at a time, and the embeddings throughout.
    """
    if setup.processes > 1 and setup.sharded:
        models = (*setup.members, *([setup.reference] if setup.reference else []))
        gathered = sum(s.embedding + 2 * (s.parameters - s.embedding) / s.layers for s in models)
        return {"weights, gathered": gathered * setup.compute}
    if setup.compute == setup.weight:
        return {}
    return {"weights, cast": (setup.adapter or setup.members[0].parameters) * setup.compute}


def peak(parts: list[Part]) -> float:
    """Peak bytes: what is always held, plus the larger of sampling and update."""
    sampling, update = (sum(p.size for p in parts if p.phase == phase) for phase in ("sampling", "update"))
    return sum(p.size for p in parts if p.phase == "always") + max(sampling, update)
