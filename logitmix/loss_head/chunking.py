"""What the passes of the fused losses share: their inputs, how these are cut into chunks and tiles, and gradients.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v tokens of a tile, D hidden width of a member.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from logitmix.loss_head.coefficients import Coefficients
from logitmix.mixture.decoding.support import Support
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import Scheme

# Bytes of a chunk's logits, enough that reading the heads again for each chunk costs little
CHUNK_BYTES = {"cpu": 32_000_000, "cuda": 1_000_000_000}
# Vocabulary rows of a tile: small enough for a CPU's cache; a GPU prefers fewer and larger operations
_TILE = {"cpu": 2048, "cuda": 1 << 15}
_MAX_CHUNK = {"cpu": 512, "cuda": 8192}
# Largest error of the given coefficients against the loss's own, relative to the largest coefficient
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LossHeadInputs:
    """The arguments of a call of `fused_log_probs`, except the hidden states, which gradients may reach."""

    heads: list[Head]
    weights: Tensor  # [K] or [N, K], float64 on the CPU
    targets_N: Tensor
    scheme: Scheme
    temperature: float
    vocab_size: int
    coefficients: Coefficients | None = None
    chunk: int | None = None
    tile: int | None = None
    diagnostics: list[MixtureDiagnostics] | None = None  # each chunk appends one
    share_products: bool = True  # one product for members that share a head
    half_dtype: torch.dtype | None = None  # the dtype of a CUDA device's matrix products
    support: Support | None = None  # the tokens that count as possible; all of the vocabulary without it

    def chunks(self, columns: int, least: int) -> Iterator[slice]:
        """Slices of the tokens such that `columns` float32 values a token fit the memory budget.

        A slice has at least `least` tokens: below that, matrix products are slow.
        """
        N, device = len(self.targets_N), self.targets_N.device.type
        fitting = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * columns)
        size = self.chunk or max(least, min(_MAX_CHUNK.get(device, _MAX_CHUNK["cuda"]), fitting))
        yield from (slice(start, min(start + size, N)) for start in range(0, N, size))

    @property
    def tile_width(self) -> int:
        device = self.targets_N.device.type
        return min(self.tile or _TILE.get(device, _TILE["cuda"]), self.vocab_size)

    @property
    def tiles(self) -> list[slice]:
        V, width = self.vocab_size, self.tile_width
        return [slice(start, min(start + width, V)) for start in range(0, V, width)]

    def member_weights(self, k: int, tokens: slice, like: Tensor) -> Tensor:
        """Weights `[n, 1]` of member k at each token."""
        weights = self.weights[..., k]
        weights = weights[tokens] if weights.dim() else weights.expand(tokens.stop - tokens.start)
        return weights.to(like).unsqueeze(-1)


def rows_to_use(heads: Sequence[Head], vocab_size: int | None) -> int:
    """`vocab_size`, by default the rows of the smallest head. Raises `ValueError` for more than these, or none."""
    smallest = min(len(head.weight) for head in heads)
    vocab_size = smallest if vocab_size is None else vocab_size
    if not 0 < vocab_size <= smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be between 1 and {smallest}, the rows of the smallest head"
        )
    return vocab_size


def active_members(weights: Tensor) -> list[int]:
    """The members of a non-zero weight `[K]` or `[N, K]` at any token; the first if there is none.

    Where all weights are 0, the mixture is the uniform distribution.
    """
    return (weights.view(-1, weights.shape[-1]) != 0).any(0).nonzero().flatten().tolist() or [0]


def validate_shapes(hidden: Sequence[Tensor], heads: Sequence[Head], targets_N: Tensor) -> None:
    """Raise `ValueError` for hidden states that are not `[N, D]` of their heads, or more or fewer than these."""
    N = len(targets_N)
    if len(heads) != len(hidden):
        raise ValueError(
            f"got hidden states of {len(hidden)} members but {len(heads)} heads; pass one head for each member"
        )
    for k, (h, head) in enumerate(zip(hidden, heads, strict=True)):
        if h.shape != (N, head.weight.shape[1]):
            raise ValueError(
                f"the hidden states of member {k} have shape {list(h.shape)}; {N} targets and a head of width "
                f"{head.weight.shape[1]} need [{N}, {head.weight.shape[1]}]"
            )


def half_dtype_of(hidden: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype in which linear layers would multiply all of `hidden` here, if it is a half-precision one."""
    device = hidden[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = reduce(torch.promote_types, [h.dtype for h in hidden])
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def accumulation_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """float64 if a tensor is, else float32: what scores and gradients are summed in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass
class Gradients:
    """Gradients that the passes fill in; None where none is needed.

    `hidden` are those of each token's log-prob by the hidden states, `weight` and `bias` those of the loss by the
    heads, up to the factor that the coefficients leave open.
    """

    hidden: list[Tensor | None]
    weight: list[Tensor | None]
    bias: list[Tensor | None]

    @classmethod
    def zeros(cls, tensors: Sequence[Tensor | None], needed: Sequence[bool], dtype: torch.dtype) -> "Gradients":
        """Gradients of 0 where `needed`, by K hidden states, K head weights and K biases."""
        zeros = [
            torch.zeros_like(t, dtype=dtype) if t is not None and is_needed else None
            for t, is_needed in zip(tensors, needed, strict=True)
        ]
        K = len(tensors) // 3
        return cls(zeros[:K], zeros[K : 2 * K], zeros[2 * K :])

    @property
    def reach_heads(self) -> bool:
        return any(gradient is not None for gradient in (*self.weight, *self.bias))


def common_factor(grad_N: Tensor, used_N: Tensor) -> float | None:
    """The `f` such that `grad = f * used` within the tolerance, None if there is none."""
    factor = (grad_N * used_N).sum() / (used_N * used_N).sum().clamp(min=torch.finfo(used_N.dtype).tiny)
    error, largest = (grad_N - factor * used_N).abs().max(), grad_N.abs().max()
    found, is_close = torch.stack([factor, (error <= _TOLERANCE * largest).to(factor)]).tolist()
    return found if is_close else None
