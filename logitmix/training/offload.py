"""Anchors that leave the device while the policy is updated: `--offload_anchor`.

Updates take the anchors' hidden states from scoring, and need of an anchor only its output head. So the other weights
leave the device once the batch of an outer step is scored, and return before the next is sampled. They never change:
what they leave to keeps a copy, and nothing is copied back to it. From a GPU it is host memory; from a CPU a file
without a name in the run's folder, which is mapped, so that weights are read when a forward pass touches them.
"""

import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.opening import unmap
from logitmix.mixture.quantization import plain_tensors

_ALIGNMENT = 64


class AnchorOffload:
    """The anchors of a mixture, on their device or away from it.

    `fetch` begins to copy them back, on a GPU beside other work; an anchor that runs waits for its weights, and
    fetches them if nobody has.
    """

    def __init__(self, anchors: Sequence[PreTrainedModel], folder: str = ".") -> None:
        self.is_away, self._folder = False, folder
        kept = {id(p) for anchor in anchors for p in anchor.get_output_embeddings().parameters()}
        weights = {id(p): p for anchor in anchors for p in anchor.parameters() if id(p) not in kept}
        unmap(p for anchor in anchors for p in anchor.parameters() if id(p) in kept)
        self._tensors = [tensor for weight in weights.values() for tensor in plain_tensors(weight)]
        self._device = self._tensors[0].device if self._tensors else torch.device("cpu")
        for anchor in anchors:
            for module in {id(m): m for m in (anchor, anchor.get_decoder())}.values():
                module.register_forward_pre_hook(self._before_forward)
        self._copied: torch.cuda.Event | None = None

    @classmethod
    def of(cls, trainer: Any) -> "AnchorOffload":
        """That of a trainer's mixture; without `offload_anchor` it moves nothing.

        Raises `ValueError` where nothing could be freed, or the updates would run the anchor.
        """
        if not trainer.args.offload_anchor:
            return cls([])
        _validate(trainer)
        os.makedirs(trainer.args.output_dir, exist_ok=True)
        return cls(trainer.model.anchors, trainer.args.output_dir)

    @property
    def num_bytes(self) -> int:
        """Bytes that leave the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)

    def release(self) -> None:
        """Free the device's copies."""
        if self.is_away or not self._tensors:
            return
        self._wait()
        copies = self._pinned if self._device.type == "cuda" else self._mapped()
        for tensor, copy in zip(self._tensors, copies, strict=True):
            tensor.data = copy
        self.is_away = True

    def fetch(self) -> None:
        """Begin to copy the weights to the device."""
        if not self.is_away:
            return
        self.is_away = False
        if self._device.type != "cuda":
            return  # mapped weights are read when they are used
        with torch.cuda.stream(self._stream):
            for tensor, copy in zip(self._tensors, self._pinned, strict=True):
                tensor.data = copy.to(self._device, non_blocking=True)
                tensor.data.record_stream(torch.cuda.default_stream(self._device))
            self._copied = self._stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.fetch()
        self._wait()

    # --- what they leave to -------------------------------------------------------------------------------------

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @cached_property
    def _pinned(self) -> list[Tensor]:
        return [tensor.data.to("cpu").pin_memory() for tensor in self._tensors]

    @cached_property
    def _file(self) -> Any:
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  open as long as this object lives
        for tensor, (start, end) in zip(self._tensors, pairwise(self._offsets), strict=True):
            content = tensor.data.contiguous().view(-1).view(torch.uint8).numpy()
            file.write(content.data)
            file.write(bytes(end - start - content.nbytes))
        file.flush()
        return file

    @property
    def _offsets(self) -> list[int]:
        sizes = (-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in self._tensors)
        return [0, *accumulate(sizes)]

    def _mapped(self) -> list[Tensor]:
        """The weights in a new mapping of the file, of which no page is in memory until it is read."""
        offsets = self._offsets
        whole = torch.from_file(f"/proc/self/fd/{self._file.fileno()}", False, offsets[-1], dtype=torch.uint8)
        return [
            whole[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
            for t, start in zip(self._tensors, offsets, strict=False)
        ]


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
    if model.device.type == "cpu" and not os.path.exists("/proc/self/fd"):
        raise ValueError(
            "offload_anchor is set, but on a CPU it needs the mapped files of Linux (/proc/self/fd); leave it out"
        )
    if not trainer.scorer.keeps_anchor_states:
        raise ValueError(
            f"offload_anchor is set, but with loss_head {args.loss_head!r}, anchor_states {args.anchor_states!r} and "
            f"dynamic_sampling {args.dynamic_sampling!r} the updates run the anchor; keep its states (loss_head "
            "'fused', anchor_states 'keep' or 'offload', and no 'refill'), or leave out offload_anchor"
        )
