"""Members that are LoRA adapters of one model, run in one pass over its weights.

Shape legend: K members that share the model, N tokens, D width, E width of a layer's output, r rank of an adapter,
S linear layers that vLLM packs into one (q, k and v, for instance).

The model runs once on the tokens repeated K times. Every linear layer with adapters adds each member's own product,
`scale (x A^T) B^T` with the member as the batch axis, and every attention layer is K layers, each with its own share
of the KV cache.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from logitmix.serving.vllm_patches import add_to_output, split_attention

_ADAPTER_WEIGHT = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.(?P<member>\w+)\.weight")


class SharedModel:
    """A vLLM model that runs one or more members of a mixture, each with or without a LoRA adapter.

    `adapters` maps a member's name to its LoRA settings as PEFT saves them. Raises `ValueError` for adapters under
    tensor parallelism, and for members that share a model without vLLM's attention layers.
    """

    def __init__(self, model: nn.Module, members: Sequence[str], adapters: dict[str, Any], config: VllmConfig) -> None:
        self.model = model
        self.members = list(members)
        self.adapters = {name: settings for name, settings in adapters.items() if isinstance(settings, dict)}
        tensor_parallel_size = get_tensor_model_parallel_world_size()
        if self.adapters and tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size is {tensor_parallel_size}, but must be 1 for members that are adapters; set it "
                "to 1, or merge the adapters with `logitmix export --merge`"
            )
        packed = getattr(model, "packed_modules_mapping", {})
        self.packed_as = {part: (whole, i) for whole, parts in packed.items() for i, part in enumerate(parts)}
        self.layers = {path: module for path, module in model.named_modules() if isinstance(module, LinearBase)}
        if len(self.members) > 1:
            attention_layers = [module for module in model.modules() if isinstance(module, Attention)]
            if not attention_layers:
                raise ValueError(
                    f"{type(model).__name__} has no attention layers of vLLM that its adapters could share; merge "
                    "the adapters with `logitmix export --merge`"
                )
            for layer in attention_layers:
                split_attention(layer, self.members, config)

    def forward(self, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Each member's hidden states `[N, D]`."""
        K = len(self.members)
        if K == 1:
            return [self.model(input_ids, positions)]
        repeated = positions.repeat(*[1] * (positions.dim() - 1), K)
        return list(self.model(input_ids.repeat(K), repeated).chunk(K))

    def load_adapter_weight(self, name: str, weight: Tensor) -> bool:
        """Load a weight if it belongs to an adapter, and return whether it does. `name` is its path in PEFT's model.

        Raises `ValueError` for an adapter that cannot run here: of another kind, or of a layer that is not linear.
        """
        match = _ADAPTER_WEIGHT.fullmatch(name)
        if match is None:
            if ".lora_" in name or ".modules_to_save." in name:
                raise ValueError(
                    f"the adapter weight {name!r} cannot run beside other adapters in vLLM; merge the adapters with "
                    "`logitmix export --merge`"
                )
            return False
        parent, _, leaf = match["path"].rpartition(".")
        whole, part = self.packed_as.get(leaf, (leaf, 0))
        layer = self.layers.get(f"{parent}.{whole}")
        if layer is None:
            raise ValueError(
                f"the adapter of {match['member']} is on {match['path']}, which is not a linear layer in vLLM; merge "
                "it with `logitmix export --merge`"
            )
        member = self.members.index(match["member"])
        self._adapters_of(layer).load(member, part, match["side"], match["path"], weight)
        return True

    def _adapters_of(self, layer: LinearBase) -> "LayerAdapters":
        """The adapters of a layer, added to it at the first of their weights."""
        if not hasattr(layer, "logitmix_adapters"):
            sizes = getattr(layer, "output_partition_sizes", None) or [layer.output_size]
            layer.logitmix_adapters = LayerAdapters(layer, self.members, sizes, self.adapters)
        return layer.logitmix_adapters


class LayerAdapters(nn.Module):
    """The adapters of all members on one linear layer: `A` `[K, D, S r]`, and `B` `[K, r, E]` of each packed layer.

    Members without an adapter, and ranks below the largest, are padded with zeros.
    """

    A: Tensor

    def __init__(
        self, layer: LinearBase, members: Sequence[str], sizes: Sequence[int], adapters: dict[str, Any]
    ) -> None:
        super().__init__()
        self.members, self.adapters = list(members), adapters
        self.rank = max(_largest_rank(settings) for settings in adapters.values())
        like = {"device": layer.weight.device, "dtype": layer.params_dtype}
        K, S = len(members), len(sizes)
        self.register_buffer("A", torch.zeros(K, layer.input_size, S * self.rank, **like), persistent=False)
        for part, size in enumerate(sizes):
            self.register_buffer(f"B_{part}", torch.zeros(K, self.rank, size, **like), persistent=False)
        self.num_parts = S
        add_to_output(layer, self.add_to)

    def load(self, member: int, part: int, side: str, path: str, weight: Tensor) -> None:
        """Copy a member's `A` `[r, D]` or `B` `[E, r]`, multiplied by its scale, of one of the packed layers."""
        if side == "A":
            start = part * self.rank
            self.A[member, :, start : start + len(weight)].copy_(weight.T)
        else:
            scale = _scale(self.adapters[self.members[member]], path, weight.shape[1])
            getattr(self, f"B_{part}")[member, : weight.shape[1]].copy_(weight.T * scale)

    def add_to(self, output: Tensor, x: Tensor) -> None:
        """Add each member's product to the layer's output in place; the output is new, so nothing else reads it."""
        K = len(self.members)
        x_KND, out_KNE = x.view(K, -1, x.shape[-1]), output.view(K, -1, output.shape[-1])
        h_SKNr = torch.bmm(x_KND, self.A).chunk(self.num_parts, dim=-1)
        B_SKrE = [getattr(self, f"B_{part}") for part in range(self.num_parts)]
        parts = torch.split(out_KNE, [B.shape[-1] for B in B_SKrE], dim=-1)
        for part, h_KNr, B_KrE in zip(parts, h_SKNr, B_SKrE, strict=True):
            part.baddbmm_(h_KNr, B_KrE)


def _scale(settings: dict[str, Any], path: str, rank: int) -> float:
    """LoRA's scale: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    alpha = next(
        (value for pattern, value in settings["alpha_pattern"].items() if re.search(rf"(^|\.){pattern}$", path)),
        settings["lora_alpha"],
    )
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _largest_rank(settings: dict[str, Any]) -> int:
    """The largest rank of an adapter's layers."""
    return max(settings["r"], *settings["rank_pattern"].values(), 0)
