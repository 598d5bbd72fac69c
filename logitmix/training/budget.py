"""Estimates, before anything is loaded, the rollouts and updates of a run, and its memory on each device.

Sizes are those of a decoder like Qwen2 (grouped-query attention, a gated MLP, RMS norms) with SDPA or flash attention.
`weight` and `compute` are the bytes per number of weights and of matrix products: 4 and 2 for float32 weights under
bf16 autocast, otherwise equal.

Weights, gradients and AdamW's moments are exact. The rest counts the tensors that PyTorch keeps, and
tests/training/test_budget.py compares it with them, and the peak of whole runs with their processes' on a CPU. There
Python and its libraries count too; on a GPU its context and fragmentation do not.
"""

from dataclasses import dataclass
from typing import Literal

from logitmix.loss_head.chunking import CHUNK_BYTES
from logitmix.training.model_shape import ModelShape

# tile of TRL's fused head: tokens x rows of the vocabulary
_TILE_TOKENS, _TILE_ROWS = 4096, 32768

# What a process of `logitmix train` takes with a model of no size
_LIBRARIES = 710_000_000

# An update's forward pass begins with the activations, and its backward pass frees them while gradients grow
Phase = Literal["always", "sampling", "scoring", "forward", "update", "saving"]
PHASES: tuple[Phase, ...] = ("sampling", "scoring", "forward", "update", "saving")


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
    anchor_bits, base_bits: bits per number of quantised linear layers, of the anchor and of a base with adapters
    offload:   whether the anchor leaves the device for updates, but for its head
    scores:    whether log-probabilities of the old policy or a reference are computed before the updates
    accumulates: whether an update adds the gradients of several forward passes
    moments:   bytes that the optimizer holds for each number that trains
    device:    `"cuda"` or `"cpu"`
    engine:    bytes of an engine of vLLM on the same device, which sleeps during updates if `engine_sleeps`
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
    anchor_bits: float = 0
    base_bits: float = 0
    offload: bool = False
    scores: bool = True
    accumulates: bool = True
    moments: float | None = None
    device: str = "cuda"
    engine: float = 0
    engine_sleeps: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers train."""
        return self.adapter or self.members[0].parameters

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
        logits = 2 * min(4 * tokens * vocabulary, CHUNK_BYTES[setup.device])
    else:
        logits = min(tokens, _TILE_TOKENS) * min(vocabulary, _TILE_ROWS) * setup.compute
    rows = tokens if setup.adapter else vocabulary + tokens  # with an adapter the head is frozen
    return logits + 4 * policy.hidden * rows


def model_bytes(shape: ModelShape, weight: int, bits: float = 0) -> float:
    """Bytes of a model's weights. Quantised are its linear layers, not its embeddings and head."""
    return shape.parameters * weight if not bits else shape.embedding * weight + _layers(shape) * bits / 8


def _layers(shape: ModelShape) -> int:
    return shape.parameters - shape.embedding


def memory(setup: Setup) -> list[Part]:
    """The parts of a device's memory; see `peak` for their maximum."""
    policy, shares = setup.members[0], setup.processes if setup.sharded else 1
    trained = (setup.adapter * 4 if setup.adapter else policy.parameters * setup.weight) / shares
    moments = 2 * trained if setup.moments is None else setup.numbers * setup.moments / shares
    parts = [
        Part("policy's weights", model_bytes(policy, setup.weight, setup.base_bits) / shares, "always"),
        *_anchors(setup, shares),
        Part("AdamW's two moments" if setup.moments is None else "the optimizer's state", moments, "always"),
        Part("gradients", trained, "update"),
        Part("activations", activation_bytes(setup), "forward"),
        Part("logits and loss", head_bytes(setup), "forward"),
    ]
    if setup.accumulates:
        parts.append(Part("gradients, of earlier passes", trained, "forward"))
    if setup.adapter:
        parts.insert(1, Part("adapter", trained, "always"))
    if setup.reference is not None:
        parts.insert(1, Part("reference's weights", setup.reference.parameters * setup.weight / shares, "always"))
    if setup.reference_adapter:
        parts.insert(2, Part("reference: a frozen copy of the adapter", trained, "always"))
    if setup.processes > 1 and not setup.sharded:
        parts.append(Part("gradients, to exchange", trained, "update"))
    if setup.engine:
        parts.append(Part("vLLM's share", setup.engine, "sampling" if setup.engine_sleeps else "always"))
    if setup.device == "cpu":
        parts.insert(0, Part("Python and its libraries", _LIBRARIES, "always"))
    if setup.sampled:
        parts += _sampling(setup)
        parts += _scoring(setup) if setup.scores else []
    copies = _weight_copies(setup)
    phases: list[Phase] = [phase for phase in ("sampling", "scoring") if any(p.phase == phase for p in parts)]
    return parts + [Part(name, size, phase) for name, size in copies.items() for phase in (*phases, "forward")]


def _anchors(setup: Setup, shares: int) -> list[Part]:
    """The weights of anchors with a model of their own; with `offload` only their heads stay for updates."""
    parts = []
    for shape in () if setup.one_base else setup.members[1:]:
        size = model_bytes(shape, setup.weights[1], setup.anchor_bits) / shares
        head = min(shape.vocabulary * shape.hidden, shape.embedding) * setup.weights[1] if setup.offload else size
        parts.append(Part("anchor's weights" if not setup.offload else "anchor's head", head, "always"))
        if setup.offload:
            rest: tuple[Phase, ...] = ("sampling", "scoring")
            parts += [Part("anchor's other weights", size - head, phase) for phase in rest]
    return parts


def _scoring(setup: Setup) -> list[Part]:
    """A forward pass of each member without gradients, one after another, and a chunk of logits."""
    tokens, policy = setup.rows * setup.length, setup.members[0]
    layer = max(tokens * (4 * s.intermediate * setup.compute + 6 * s.hidden * setup.weight) for s in setup.members)
    logits = 2 * min(4 * setup.rows * setup.completion * policy.vocabulary, CHUNK_BYTES[setup.device])
    states = sum(setup.sampled * setup.completion * s.hidden * setup.compute for s in setup.members[1:])
    return [Part("a layer, and logits", layer + logits, "scoring"), Part("kept states of anchors", states, "forward")]


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


def phase_bytes(parts: list[Part]) -> dict[str, float]:
    """Bytes of each phase, with what is always held."""
    always = sum(p.size for p in parts if p.phase == "always")
    return {phase: always + sum(p.size for p in parts if p.phase == phase) for phase in PHASES}


def peak(parts: list[Part]) -> float:
    """Peak bytes: those of the phase that needs most."""
    return max(phase_bytes(parts).values())


def disk_bytes(setup: Setup, checkpoints: int, save_frozen: str, with_optimizer: bool) -> dict[str, float]:
    """Bytes that a run leaves on disk: `checkpoints` of them, the frozen weights kept beside them, and the model.

    The frozen weights are stored before the first checkpoint and become part of the model, so that they take no disk
    twice at the end.
    """
    policy = setup.members[0]
    trained = setup.adapter * 4 if setup.adapter else policy.parameters * setup.weight
    frozen = model_bytes(policy, setup.weight, setup.base_bits) if setup.adapter else 0.0
    if not setup.one_base:
        frozen += sum(model_bytes(s, setup.weights[1], setup.anchor_bits) for s in setup.members[1:])
    moments = setup.numbers * (8 if setup.moments is None and setup.weight == 4 else setup.moments or 4)
    whole = trained + frozen
    each = (whole if save_frozen == "always" else trained) + (moments if with_optimizer else 0)
    return {"checkpoints": checkpoints * each, "model": trained if save_frozen == "never" else whole}
