"""A member's output head, read from what the member does with it.

Shape legend: B batch, T time, D width of the hidden states, V vocabulary.

Architectures differ in what stands between the decoder and the logits: a bias, a scale (Cohere, Granite,
Falcon-H1, …), a soft cap (Gemma). Their configurations name these things in many ways, and some name what they do not
do. So nothing is read from a name: `infer_head_transform` runs the member once, puts known numbers in the place of its
head's output, and looks at what comes out as logits. What it cannot explain it refuses.
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
_REFERENCE = 'score the mixture from its members\' logits instead, with loss_head="reference"'


@dataclass(frozen=True)
class Head:
    """How a member turns its last hidden states into logits: `softcap(scale * (h @ weight.T + bias))`.

    `weight` is `[V, D]`, `bias` `[V]` or None, `softcap(z) = cap * tanh(z / cap)`, or nothing where it is None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., D]`, in their dtype: the reference for the fused loss head."""
        return self.transform(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def transform(self, z: Tensor) -> Tensor:
        """Logits from the products `h @ weight.T + bias`."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class HeadTransform:
    """What a member does to its head's output `z`: `softcap(scale * z)`; see [`logitmix.mixture.log_probs.Head`]."""

    scale: float = 1.0
    softcap: float | None = None


def last_hidden_states(member: PreTrainedModel, **inputs: Any) -> Tensor:
    """The hidden states `[B, T, D]` that the member's output head multiplies; `inputs` are those of its forward."""
    hidden_BTD: Tensor = member.get_decoder()(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return hidden_BTD


def read_head(member: PreTrainedModel, transform: HeadTransform) -> Head:
    """The member's head as it is now. Wrappers (FSDP, DeepSpeed) replace its parameters: see `run_inside_heads`."""
    head = member.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None), transform.scale, transform.softcap)


def run_inside_heads(
    heads: Sequence[nn.Module], hidden: Sequence[Tensor], then: Callable[[list[Tensor]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """`then(hidden)`, run inside the forward of each of the heads, `hidden` being their inputs.

    A wrapper that shards parameters has them whole there, and knows by a module's inputs and outputs when they are
    needed in the backward pass.
    """
    received = list(hidden)

    def enter(modules: list[nn.Module]) -> tuple[Tensor, ...]:
        if not modules:
            return then(received)
        module, *rest = modules
        places = [k for k, head in enumerate(heads) if head is module]

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            for k, states in zip(places, inputs, strict=True):
                received[k] = states
            return enter(rest)

        own = vars(module).get("forward")
        module.forward = forward
        try:
            outputs: tuple[Tensor, ...] = module(*(hidden[k] for k in places))
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own
        return outputs

    return enter(list(dict.fromkeys(heads)))


@torch.no_grad()
def infer_head_transform(member: PreTrainedModel, name: str = "the model") -> HeadTransform:
    """What the member does between `last_hidden_states` and its logits, beside its head's weight and bias.

    Runs two tokens through the member and changes nothing in it.

    Raises `ValueError`, which names the member by `name`, where the member's logits are anything else than
    `softcap(scale * (h @ weight.T + bias))` of its last hidden states.
    """
    with _whole(member):
        return _measure(member, name)


def _whole(member: PreTrainedModel) -> AbstractContextManager[None]:
    """In this context the member's parameters are whole, where DeepSpeed's ZeRO-3 partitions them on loading."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(member.parameters()))
    return gathered


def _measure(member: PreTrainedModel, name: str) -> HeadTransform:
    head, decoder = member.get_output_embeddings(), member.get_decoder()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise _unknown(name, f"its output head is a {type(head).__name__}, without one matrix of weights")
    others = [key for key, _ in head.named_parameters() if key not in ("weight", "bias")]
    if others:  # an adapter, which may do nothing yet
        raise _unknown(name, f"its output head, a {type(head).__name__}, has a parameter {others[0]!r}")

    seen: dict[str, Tensor] = {}

    def see_decoder(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def replace_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["input"], seen["output"] = args[0], output
        # in float64, whatever the member's dtype, so that what is done to it can be measured well
        seen["known"] = _known_values(output)
        return seen["known"]

    hooks = [decoder.register_forward_hook(see_decoder), head.register_forward_hook(replace_output)]
    try:
        ids = torch.arange(_PROBE_TOKENS, device=weight.device).unsqueeze(0) + 1
        logits = member(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()

    if seen.keys() != {"hidden", "input", "output", "known"}:
        raise _unknown(name, "its forward runs its decoder or its output head in a way of its own")
    if not torch.equal(seen["input"], seen["hidden"].to(seen["input"])):
        raise _unknown(name, "it changes the hidden states between its decoder and its output head")
    expected = nn.functional.linear(seen["input"], weight, getattr(head, "bias", None))
    if expected.shape != seen["output"].shape or not _is_close(seen["output"], expected):
        raise _unknown(name, f"its output head, a {type(head).__name__}, does more than multiply by its weight")
    if logits.shape != seen["known"].shape:
        raise _unknown(name, f"its head gives {seen['known'].shape[-1]} values and its logits are {logits.shape[-1]}")
    return _fit_transform(seen["known"], logits.double(), name)


def _known_values(output: Tensor) -> Tensor:
    """Numbers of both signs from 1e-6 to 1e6, in the shape of `output`."""
    magnitudes = torch.logspace(-6, 6, output.numel(), dtype=torch.float64, device=output.device)
    signs = torch.arange(output.numel(), device=output.device) % 2 * 2 - 1
    return (magnitudes * signs).view(output.shape)


def _fit_transform(known: Tensor, logits: Tensor, name: str) -> HeadTransform:
    """The scale is the slope at 0, the cap the limit far from it."""
    scale = (logits.flatten()[0] / known.flatten()[0]).item()
    for softcap in (None, logits.abs().max().item()):
        head = Head(torch.ones(1, 1, dtype=torch.float64, device=known.device), None, scale, softcap)
        if torch.allclose(head.logits(known.unsqueeze(-1)).squeeze(-1), logits, rtol=1e-5, atol=0):
            return HeadTransform(_rounded(scale), softcap if softcap is None else _rounded(softcap))
    raise _unknown(name, "it does something else to its logits than to scale and soft-cap them")


def _rounded(x: float) -> float:
    """To the precision of float32, in which a member may compute it: 0.3, not 0.30000001192."""
    return float(f"{x:.7g}")


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    rtol = {torch.float32: 1e-4, torch.float64: 1e-8}.get(actual.dtype, 2e-2)
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= rtol * expected.double().abs().max())


def _unknown(name: str, reason: str) -> ValueError:
    return ValueError(f"the fused loss head cannot read the head of {name}: {reason}; {_REFERENCE}")
