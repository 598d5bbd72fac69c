"""What a run will take, worked out before anything is loaded: rollouts and updates, and bytes on each device.

Sizes are those of a decoder like Qwen2's (attention with grouped keys, a gated MLP, RMS norms) under SDPA or flash
attention. `weight` and `compute` are bytes a number, of the weights and of the products of matrices: 4 and 2 where
float32 weights run under bf16 autocast, else alike.

Weights, gradients and AdamW's moments are exact. The rest counts the tensors that PyTorch keeps, and
`tests/test_budget.py` holds it against them. Not counted: the CUDA context, and what the allocator loses.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from logitmix.loss_head.chunking import CHUNK_BYTES

# TRL's fused head takes so many tokens x so many rows of the vocabulary at a time
_TILE_TOKENS, _TILE_ROWS = 4096, 32768

Phase = Literal["always", "sampling", "update"]


@dataclass(frozen=True)
class Batches:
    """TRL's batch sizes, `rows` being per_device_train_batch_size, and what follows from them for all processes."""

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
        """Rollouts that are sampled together: an outer step of the paper."""
        return self.rows * self.steps_per_generation * self.processes

    @property
    def updates_per_outer_step(self) -> float:
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    def updates_in(self, questions: int) -> int:
        """Updates in one pass over so many questions; those that fill no whole generation step are left out."""
        generations = questions * self.num_generations // self.rollouts_per_outer_step
        return int(generations * self.updates_per_outer_step)


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on of a model. `embedding` counts token embeddings and head, once where they are tied."""

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
    """A run as memory sees it.

    members:   the policy, and the anchor where there is one: both run in every forward
    reference: the frozen model of a KL term, which is not sampled from
    rows:      sequences in a forward with gradients
    sampled:   rollouts sampled at a time; 0 in SFT
    processes: each on a device of its own
    sharded:   whether they share weights, gradients and moments (FSDP, ZeRO-3), or each has them whole (DDP)
    adapter:   float32 numbers of the LoRA adapter that is trained in the policy's place; 0: there is none
    one_base:  whether the anchor is the policy's model under another adapter, or none
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

    @property
    def length(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Part:
    """Some bytes of a device's memory, and when they are taken."""

    name: str
    size: float
    phase: Phase


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """The shape of a model of this configuration, counted on the meta device, where nothing is allocated."""
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
    """How many numbers an adapter trains on a model of this configuration."""
    model = get_peft_model(_on_meta(config.to_dict()), peft_config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _on_meta(config: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def layer_bytes(setup: Setup) -> int:
    """What the backward pass of one of the policy's layers keeps.

    Each of the two norms keeps its input (in float32) and the normalised values, and its output, which the products
    read: in `weight`, or under autocast as a copy for each of the five. Attention keeps the queries, the keys and the
    values repeated to all heads, its output, that once more for the product that follows, and a mask of every
    sequence; the MLP keeps four tensors of the intermediate size.
    """
    policy, weight, compute = setup.members[0], setup.weight, setup.compute
    outputs = 5 * compute if compute < weight else 2 * weight
    norms = policy.hidden * (2 * 4 + 2 * weight + outputs)
    token = norms + compute * (5 * policy.heads * policy.head_size + 4 * policy.intermediate)
    return setup.rows * setup.length * (token + setup.length * compute)


def activation_bytes(setup: Setup) -> int:
    """What the policy's decoder keeps for the backward pass, and the gradients of the layer that this is in.

    That is every layer; with checkpointing their inputs, and one layer that is computed again.
    """
    policy, layer = setup.members[0], layer_bytes(setup)
    if not setup.checkpointing:
        return (policy.layers + 1) * layer
    return setup.rows * setup.length * policy.layers * setup.weight * policy.hidden + 2 * layer


def kv_cache_bytes(shape: ModelShape, tokens: int, weight: int) -> int:
    """Keys and values of all layers. They have the weights' dtype under autocast too, as the rotation's angles do."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size * tokens * weight


def head_bytes(setup: Setup) -> int:
    """The loss, from the last hidden states on.

    Of a mixture the fused loss head takes so many bytes of logits at a time, with what they become beside them; of a
    single model TRL's takes a tile. Both give the gradients of the head and of the hidden states in float32.
    """
    policy, vocabulary = setup.members[0], min(shape.vocabulary for shape in setup.members)
    tokens = setup.rows * (setup.completion if len(setup.members) > 1 else setup.length)
    if len(setup.members) > 1:
        logits = 2 * min(4 * tokens * vocabulary, CHUNK_BYTES["cuda"])
    else:
        logits = min(tokens, _TILE_TOKENS) * min(vocabulary, _TILE_ROWS) * setup.compute
    rows = tokens if setup.adapter else vocabulary + tokens  # beside an adapter the head is frozen
    return logits + 4 * policy.hidden * rows


def memory(setup: Setup) -> list[Part]:
    """The parts of a device's memory; `peak` adds them up."""
    policy, shares = setup.members[0], setup.processes if setup.sharded else 1
    trained = (setup.adapter * 4 if setup.adapter else policy.parameters * setup.weight) / shares
    frozen = () if setup.one_base else setup.members[1:]
    parts = [
        Part("policy's weights", policy.parameters * setup.weight / shares, "always"),
        *(Part("anchor's weights", s.parameters * setup.weight / shares, "always") for s in frozen),
        Part("AdamW's two moments", 2 * trained, "always"),
        Part("gradients", trained, "update"),
        Part("activations", activation_bytes(setup), "update"),
        Part("logits and loss", head_bytes(setup), "update"),
    ]
    if setup.adapter:
        parts.insert(1, Part("adapter", trained, "always"))
    if setup.reference is not None:
        parts.insert(1, Part("reference's weights", setup.reference.parameters * setup.weight / shares, "always"))
    if setup.processes > 1 and not setup.sharded:
        parts.append(Part("gradients, to exchange", trained, "update"))
    if setup.sampled:
        parts += _sampling(setup)
    copies = _weight_copies(setup)
    phases: tuple[Phase, ...] = ("sampling", "update") if setup.sampled else ("update",)
    return parts + [Part(name, size, phase) for name, size in copies.items() for phase in phases]


def _sampling(setup: Setup) -> list[Part]:
    tokens, vocabulary = setup.sampled * setup.length, setup.members[0].vocabulary
    # while the prompts are read, of one layer: three tensors of the MLP's, beside the residual and its norm
    prompts = max(3 * s.intermediate * setup.compute + 3 * s.hidden * setup.weight for s in setup.members)
    # each member's logits, and the mixture's: mixed, scaled, as probabilities
    logits = setup.sampled * vocabulary * 4 * (len(setup.members) + 3)
    return [
        Part("KV cache", sum(kv_cache_bytes(s, tokens, setup.weight) for s in setup.members), "sampling"),
        Part("prompts in a layer", setup.sampled * setup.prompt * prompts, "sampling"),
        Part("next token's logits", logits, "sampling"),
    ]


def _weight_copies(setup: Setup) -> dict[str, float]:
    """Weights beside the weights: under autocast a forward keeps a copy of those that are trained; sharding gathers a
    layer while the next one is on its way, and the embeddings throughout.
    """
    if setup.processes > 1 and setup.sharded:
        models = (*setup.members, *([setup.reference] if setup.reference else []))
        gathered = sum(s.embedding + 2 * (s.parameters - s.embedding) / s.layers for s in models)
        return {"weights, gathered": gathered * setup.compute}
    if setup.compute == setup.weight:
        return {}
    return {"weights, cast": (setup.adapter or setup.members[0].parameters) * setup.compute}


def peak(parts: list[Part]) -> float:
    """Bytes at the worst moment: what is always there, and the more of sampling and updating."""
    sampling, update = (sum(p.size for p in parts if p.phase == phase) for phase in ("sampling", "update"))
    return sum(p.size for p in parts if p.phase == "always") + max(sampling, update)
