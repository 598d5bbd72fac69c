"""Anchors in host memory while the policy is updated: `--offload_anchor`.

Updates take the anchors' hidden states from scoring, and need of an anchor only its output head. So the other weights
leave the device once the batch of an outer step is scored, and return before the next is sampled. They never change:
the host keeps a copy, and nothing is copied back to it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitmix.mixture.modeling import LogitMixForCausalLM


class AnchorOffload:
    """The anchors of a mixture, on their device or away from it.

    `fetch` begins to copy them back, on a GPU beside other work; an anchor that runs waits for its weights, and
    fetches them if nobody has. On a CPU the host's memory is the device's, and nothing moves.
    """

    def __init__(self, anchors: Sequence[PreTrainedModel]) -> None:
        self.is_away = False
        self._weights = {id(p): p for anchor in anchors for p in anchor.parameters()}
        for anchor in anchors:
            for parameter in anchor.get_output_embeddings().parameters():
                self._weights.pop(id(parameter), None)
            for module in {id(m): m for m in (anchor, anchor.get_decoder())}.values():
                module.register_forward_pre_hook(self._before_forward)
        self._host: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @classmethod
    def of(cls, trainer: Any) -> "AnchorOffload":
        """That of a trainer's mixture; without `offload_anchor` it moves nothing.

        Raises `ValueError` where nothing could be freed, or the updates would run the anchor.
        """
        if not trainer.args.offload_anchor:
            return cls([])
        _validate(trainer)
        return cls(trainer.model.anchors)

    @property
    def num_bytes(self) -> int:
        """Bytes that leave the device."""
        return sum(weight.numel() * weight.element_size() for weight in self._weights.values())

    def release(self) -> None:
        """Free the device's copies."""
        if self.is_away or not self._weights:
            return
        self._wait()
        for key, weight in self._weights.items():
            if key not in self._host:
                host = weight.data.to("cpu")
                self._host[key] = host.pin_memory() if weight.is_cuda else host
                self._device = weight.device
            weight.data = self._host[key]
        self.is_away = True

    def fetch(self) -> None:
        """Begin to copy the weights to the device."""
        if not self.is_away:
            return
        self.is_away = False
        if self._device.type != "cuda":
            for key, weight in self._weights.items():
                weight.data = self._host[key].to(self._device)
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            for key, weight in self._weights.items():
                weight.data = self._host[key].to(self._device, non_blocking=True)
                weight.data.record_stream(torch.cuda.default_stream(self._device))
            self._copied = self._stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.fetch()
        self._wait()


def _validate(trainer: Any) -> None:
    """Raise `ValueError` where `offload_anchor` could not free anything, or the updates would run the anchor."""
    model, args = trainer.model, trainer.args
    if not isinstance(model, LogitMixForCausalLM) or not model.anchors:
        shared = isinstance(model, LogitMixForCausalLM)
        reason = "the anchor shares the policy's weights, which train" if shared else "there is no anchor"
        raise ValueError(f"offload_anchor is set, but {reason}; leave it out")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "offload_anchor is set, but FSDP and DeepSpeed place the weights that they shard; leave it out, or use "
            "the offloading of FSDP (fsdp_offload_params) or of DeepSpeed (offload_param)"
        )
    if model.config.quantized_models:
        raise ValueError(
            f"offload_anchor is set, but {model.config.quantized_models[0]} has quantised weights, which stay where "
            "they are; leave out one of them"
        )
    if not trainer.scorer.keeps_anchor_states:
        raise ValueError(
            f"offload_anchor is set, but with loss_head {args.loss_head!r}, anchor_states {args.anchor_states!r} and "
            f"dynamic_sampling {args.dynamic_sampling!r} the updates run the anchor; keep its states (loss_head "
            "'fused', anchor_states 'keep' or 'offload', and no 'refill'), or leave out offload_anchor"
        )
