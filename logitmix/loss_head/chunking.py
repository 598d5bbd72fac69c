"""What the passes of the fused loss head share: the inputs, its cuts into chunks and tiles, its matrix products.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v of a tile, D width of a member's hidden states.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import Head
from logitmix.mixture.mixing import Scheme

Coefficients = Callable[[Tensor, slice], Tensor]
"""From the log-probs `[n]` of a chunk, and where its tokens stand among all N: the loss's derivative by them, `[n]`,
up to one factor common to all tokens (an accumulation's, or a loss scaler's)."""

# Bytes of a chunk's logits; from here on, reading the heads again for each chunk costs little.
CHUNK_BYTES = {"cpu": 32_000_000, "cuda": 1_000_000_000}
# Vocabulary rows of a tile: on a CPU it stays in the cache, on a device fewer and larger operations count.
_TILE = {"cpu": 2048, "cuda": 1 << 15}
_MAX_CHUNK = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class LossHeadInputs:
    """What a call of `fused_log_probs` is about, beside the tensors that gradients may reach."""

    heads: list[Head]
    weights: Tensor  # [K] or [N, K], float64 on the CPU
    targets_N: Tensor
    scheme: Scheme
    temperature: float
    vocab_size: int
    coefficients: Coefficients | None = None
    chunk: int | None = None
    tile: int | None = None
    diagnostics: list[MixtureDiagnostics] | None = None  # one a chunk is appended
    half: torch.dtype | None = None  # in which a CUDA device multiplies

    def chunks(self, columns: int, least: int) -> Iterator[slice]:
        """Slices of tokens, so few that `columns` values a token fit the budget, but `least` at least, below which
        matrix products are slow."""
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

    def weights_of(self, k: int, tokens: slice, like: Tensor) -> Tensor:
        """Weights `[n, 1]` of member k."""
        weights = self.weights[..., k]
        weights = weights[tokens] if weights.dim() else weights.expand(tokens.stop - tokens.start)
        return weights.to(like).unsqueeze(-1)


@dataclass
class Gradients:
    """Of the log-probs by the hidden states, a row a token; of the loss by head weights and biases, up to a factor.

    None where it is not asked for.
    """

    hidden: list[Tensor | None]
    weight: list[Tensor | None]
    bias: list[Tensor | None]

    @property
    def of_heads(self) -> bool:
        return any(gradient is not None for gradient in (*self.weight, *self.bias))


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype, half: torch.dtype | None = None) -> Tensor:
    """`a @ b`, added up in `dtype`; a CUDA device multiplies in `half` if given."""
    if half is not None and a.is_cuda:
        return torch.mm(a.to(half), b.to(half), out_dtype=dtype)
    a, b = a.to(dtype), b.to(dtype)  # a CPU in half precision would round the sums as well
    if _multiplies_by_onednn(a):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return product
    return a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor, half: torch.dtype | None = None) -> None:
    """`out += a @ b`, with the precision of `multiply`."""
    if half is not None and out.is_cuda:
        torch.addmm(out, a.to(half), b.to(half), out_dtype=out.dtype, out=out)
    elif _multiplies_by_onednn(out):
        out.add_(multiply(a, b, out.dtype))
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _multiplies_by_onednn(like: Tensor) -> bool:
    """Where oneDNN is up to twice as fast as `torch.mm`, that is MKL's, which uses AVX-512 on Intel's CPUs alone."""
    is_asked = like.device.type == "cpu" and like.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled)
    return is_asked and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
