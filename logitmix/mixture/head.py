"""A member's output head, inferred from what the member does with it.

Shape legend: B batch, T time, D width of the hidden states, V vocabulary.

Architectures differ in what happens between the decoder and the logits: a bias, a scale (Cohere, Granite, Falcon-H1,
…), a soft cap (Gemma). Their configurations use many names for these, some for operations that they do not apply. So
`infer_head_transform` reads no names: it runs the member once, substitutes known numbers for the output of its head,
and compares them with the logits. It rejects what it cannot explain.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

_PROBE_TOKENS = 2
REFERENCE = 'score from the members\' logits instead, with loss_head="reference"'


@dataclass(frozen=True)
class Head:
    """A member's map from its last hidden states to its logits: `softcap(scale * (h @ weight.T + bias))`.

    `weight` is `[V, D]`, `bias` is `[V]` or None, and `softcap(z) = cap * tanh(z / cap)`, or `z` without a cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`, in their dtype; the reference for the fused loss head."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, z: Tensor) -> Tensor:
        """`softcap(scale * z)`: logits from `z = h @ weight.T + bias`."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class HeadTransform:
    """What a member applies to the output `z` of its head: `softcap(scale * z)`; see `Head`."""

    scale: float = 1.0
    softcap: float | None = None


def run_decoder(member: PreTrainedModel, **inputs: Any) -> Any:
    """The output of the member's decoder, whose `last_hidden_state` `[B, T, D]` is the input of the output head."""
    return member.get_decoder()(**inputs, use_cache=False, return_dict=True)


def read_head(member: PreTrainedModel, transform: HeadTransform) -> Head:
    """The member's head with its present parameters, which FSDP and DeepSpeed replace: see `run_inside_heads`."""
    head = member.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None), transform.scale, transform.softcap)


def run_inside_heads(
    heads: Sequence[nn.Module], hidden: Sequence[Tensor], function: Callable[[list[Tensor]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`function(hidden)`, run inside the forward of every head, with each head's hidden states as its inputs.

    Wrappers that shard parameters gather them for the forward of a module, and use its inputs and outputs to schedule
    its backward pass.
    """
    received = list(hidden)

    def enter(modules: list[nn.Module]) -> tuple[Tensor, ...]:
        if not modules:
            return function(received)
        module, *rest = modules
        places = [k for k, head in enumerate(heads) if head is module]

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            for k, states in zip(places, inputs, strict=True):
                received[k] = states
            return enter(rest)

        own_forward = vars(module).get("forward")
        module.forward = forward
        try:
            outputs: tuple[Tensor, ...] = module(*(hidden[k] for k in places))
        finally:
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
        return outputs

    return enter(list(dict.fromkeys(heads)))


@torch.no_grad()
def infer_head_transform(member: PreTrainedModel, name: str = "the model") -> HeadTransform:
    """The scale and soft cap between the output of the member's head and its logits.

    Runs two tokens through the member and changes nothing in it.

    Raises `ValueError`, which refers to the member as `name`, if its logits are not
    `softcap(scale * (h @ weight.T + bias))` of its last hidden states.
    """
    with gathered_parameters(member):
        return _infer(member, name)


def gathered_parameters(member: PreTrainedModel) -> AbstractContextManager[None]:
    """Gathers the parameters that DeepSpeed's ZeRO-3 partitions on loading, within the context."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(member.parameters()))
    return gathered


def _infer(member: PreTrainedModel, name: str) -> HeadTransform:
    head, decoder = member.get_output_embeddings(), member.get_decoder()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise _unreadable(name, f"its output head is a {type(head).__name__}, which has no single weight matrix")
    others = [key for key, _ in head.named_parameters() if key not in ("weight", "bias")]
    if others:  # an adapter, which may have no effect yet
        raise _unreadable(name, f"its output head, a {type(head).__name__}, has a parameter {others[0]!r}")

    seen: dict[str, Tensor] = {}

    def record_hidden(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def replace_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["input"], seen["output"] = args[0], output
        # in float64 whatever the member's dtype, to infer the transform accurately
        seen["known"] = _known_values(output)
        return seen["known"]

    hooks = [decoder.register_forward_hook(record_hidden), head.register_forward_hook(replace_output)]
    try:
        ids = torch.arange(_PROBE_TOKENS, device=weight.device).unsqueeze(0) + 1
        logits = member(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()

    if seen.keys() != {"hidden", "input", "output", "known"}:
        raise _unreadable(name, "its forward does not call its decoder and its output head in the usual way")
    if not torch.equal(seen["input"], seen["hidden"].to(seen["input"])):
        raise _unreadable(name, "it changes the hidden states between its decoder and its output head")
    expected = nn.functional.linear(seen["input"], weight, getattr(head, "bias", None))
    if expected.shape != seen["output"].shape or not _is_close(seen["output"], expected):
        raise _unreadable(name, f"its output head, a {type(head).__name__}, does more than multiply by its weight")
    if logits.shape != seen["known"].shape:
        raise _unreadable(
            name, f"its head has {seen['known'].shape[-1]} outputs but it returns {logits.shape[-1]} logits"
        )
    return _fit_transform(seen["known"], logits.double(), name)


def _known_values(output: Tensor) -> Tensor:
    """Numbers of both signs from 1e-6 to 1e6, in the shape of `output`."""
    magnitudes = torch.logspace(-6, 6, output.numel(), dtype=torch.float64, device=output.device)
    signs = torch.arange(output.numel(), device=output.device) % 2 * 2 - 1
    return (magnitudes * signs).view(output.shape)


def _fit_transform(known: Tensor, logits: Tensor, name: str) -> HeadTransform:
    """The scale is the slope at 0, the soft cap the limit at infinity."""
    scale = (logits.flatten()[0] / known.flatten()[0]).item()
    for softcap in (None, logits.abs().max().item()):
        head = Head(torch.ones(1, 1, dtype=torch.float64, device=known.device), None, scale, softcap)
        if torch.allclose(head.logits(known.unsqueeze(-1)).squeeze(-1), logits, rtol=1e-5, atol=0):
            return HeadTransform(_rounded(scale), softcap if softcap is None else _rounded(softcap))
    raise _unreadable(name, "it changes its logits by more than a scale and a soft cap")


def _rounded(x: float) -> float:
    """Round to the precision of float32, in which a member may compute it: 0.3, not 0.30000001192."""
    return float(f"{x:.7g}")


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    rtol = {torch.float32: 1e-4, torch.float64: 1e-8}.get(actual.dtype, 2e-2)
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= rtol * expected.double().abs().max())


def _unreadable(name: str, reason: str) -> ValueError:
    return ValueError(f"the fused loss head cannot read the head of {name}: {reason}; {REFERENCE}")
