"""Passes of the fused loss head over the vocabulary: from hidden states to log-probs, entropies and gradients.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v of a tile, D width of a member's hidden states.

`loss_head.py` is the door; `docs/loss_head.md` has the derivation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from logitmix.logprobs import Head, log_probs_and_entropy
from logitmix.mixing import Scheme, mix_logits

Coefficients = Callable[[Tensor, slice], Tensor]
"""From the log-probs `[n]` of a chunk, and where its tokens stand among all N: the loss's derivative by them, `[n]`,
up to one factor common to all tokens (an accumulation's, or a loss scaler's)."""

# Bytes of a chunk's logits. On a CPU, reading the heads again for each chunk costs little from here on.
_CHUNK_BYTES = {"cpu": 76_000_000, "cuda": 1_000_000_000}
# Vocabulary rows of a tile: on a CPU it stays in the cache, on a device fewer and larger operations count.
_TILE = {"cpu": 1024, "cuda": 1 << 15}
_MAX_CHUNK = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Job:
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

    def chunks(self, columns: int) -> Iterator[slice]:
        """Slices of tokens, few enough that `columns` values a token stay within the budget."""
        N, device = len(self.targets_N), self.targets_N.device.type
        budget = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"])
        size = self.chunk or max(1, min(_MAX_CHUNK.get(device, _MAX_CHUNK["cuda"]), budget // (4 * columns)))
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


def run_passes(
    job: Job,
    tensors: Sequence[Tensor | None],
    wants: Sequence[bool],
    grad_scores: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Log-probs `[N]`, entropies `[N]` and the gradients that `wants` names.

    `tensors` are K hidden states, K head weights and K biases, `wants` one truth value for each. The heads' gradients
    are of `sum(coefficients * log_probs)`, the coefficients taken as constants. With `grad_scores`, the loss's
    derivatives by log-probs and entropies, all gradients are of the loss itself.
    """
    K, N = len(job.heads), len(job.targets_N)
    hidden: list[Tensor] = list(tensors[:K])  # type: ignore[arg-type]
    job = replace(
        job,
        heads=[
            replace(head, weight=weight, bias=bias)  # type: ignore[arg-type]
            for head, weight, bias in zip(job.heads, tensors[K : 2 * K], tensors[2 * K :], strict=True)
        ],
    )
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    zeros = [
        torch.zeros_like(t, dtype=dtype) if t is not None and want else None
        for t, want in zip(tensors, wants, strict=True)
    ]
    gradients = Gradients(zeros[:K], zeros[K : 2 * K], zeros[2 * K :])
    scores = torch.empty(2, N, dtype=dtype, device=job.targets_N.device)
    is_linear = job.scheme == "logit" and all(head.softcap is None for head in job.heads)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        if is_linear and grad_scores is None:
            _linear(job, hidden, scores, gradients)
        else:
            _general(job, hidden, scores, gradients, grad_scores)
    return scores[0], scores[1], gradients


# --- scheme "logit" without soft caps --------------------------------------------------------------------------------


class _Group:
    """Members of one head, for a chunk of tokens: they are mixed before the head."""

    def __init__(
        self, job: Job, members: list[int], hidden: list[Tensor], tokens: slice, gradients: Gradients, like: Tensor
    ) -> None:
        self.members, self.head = members, job.heads[members[0]]
        # each member's factor on its products, [n, 1]
        self.factors = [job.weights_of(k, tokens, like) * (self.head.scale / job.temperature) for k in members]
        mixed, total = torch.zeros((), dtype=like.dtype, device=like.device), torch.zeros_like(self.factors[0])
        for k, factor in zip(members, self.factors, strict=True):
            mixed, total = mixed + factor * hidden[k][tokens].to(like.dtype), total + factor
        self.hidden_nD, self.factor_n = mixed, total.squeeze(-1)
        self.by_hidden = [gradients.hidden[k] for k in members]
        # the mean of the head's rows under the mixture, the target's row left out, times the mass
        self.mean_nD = torch.zeros_like(mixed) if any(g is not None for g in self.by_hidden) else None


def _linear(job: Job, hidden: list[Tensor], scores: Tensor, gradients: Gradients) -> None:
    """The mixture's logits are one linear map of the hidden states, `sum_k (w_k scale_k / T) (W_k h_k + b_k)`.

    One pass over tiles of the vocabulary keeps a running maximum and sums under it (Milakov & Gimelshein,
    arXiv 1805.02867), and with them the mean of the heads' rows under the mixture, as attention does. Only the heads'
    gradient needs the probabilities of a whole chunk.
    """
    groups = _by_head(job.heads)
    keeps = gradients.of_heads
    chunks = list(job.chunks(job.vocab_size if keeps else job.tile_width))
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    logits = scores.new_empty(rows, job.tile_width)
    masses = scores.new_empty(rows, job.vocab_size if keeps else job.tile_width)
    for tokens in chunks:
        n = tokens.stop - tokens.start
        chunk = [_Group(job, members, hidden, tokens, gradients, scores[0]) for members in groups]
        peaks, miss_n = _read_vocabulary(job, chunk, tokens, scores, logits[:n], masses[:n], keeps)
        if keeps:
            _gradients_of_heads(job, chunk, tokens, scores[0], peaks, miss_n, masses[:n], gradients)


def _read_vocabulary(
    job: Job, chunk: list[_Group], tokens: slice, scores: Tensor, logits: Tensor, masses: Tensor, keeps: bool
) -> tuple[list[Tensor], Tensor]:
    """Fill in the chunk's scores and its gradients by hidden states, and with `keeps` also `masses` `[n, V]`.

    `masses` are `exp(z - peak)` with the peak known at each tile, which is returned relative to `log sum exp z`: the
    probabilities of a tile are its masses times `exp` of that. The target's own mass is left out of them, so that
    `1 - p(target)`, returned as well, is a sum of small numbers, not a small difference: a token that is all but
    certain keeps its log-prob and its gradient.
    """
    targets_n1 = job.targets_N[tokens].unsqueeze(-1)
    peak_n = torch.full_like(scores[0, tokens], -torch.inf)
    others_n, moment_n, picked_n1 = torch.zeros_like(peak_n), torch.zeros_like(peak_n), peak_n.unsqueeze(-1)
    peaks = []
    for tile in job.tiles:
        z_nv = logits[:, : tile.stop - tile.start]
        for i, group in enumerate(chunk):
            _add_product(z_nv, group.hidden_nD, group.head.weight[tile].T, overwrite=i == 0)
            if group.head.bias is not None:
                z_nv.addr_(group.factor_n, group.head.bias[tile].to(z_nv))
        higher_n = torch.maximum(peak_n, z_nv.amax(-1))
        shrink_n, peak_n = torch.exp(peak_n - higher_n), higher_n
        e_nv = masses[:, tile] if keeps else masses[:, : tile.stop - tile.start]
        torch.sub(z_nv, peak_n.unsqueeze(-1), out=e_nv).exp_()
        at_n1 = (targets_n1 - tile.start).clamp(0, tile.stop - tile.start - 1)
        is_here_n1 = (targets_n1 >= tile.start) & (targets_n1 < tile.stop)
        picked_n1 = torch.where(is_here_n1, z_nv.gather(1, at_n1), picked_n1)
        e_nv.scatter_(1, at_n1, e_nv.gather(1, at_n1).masked_fill_(is_here_n1, 0.0))
        others_n.mul_(shrink_n).add_(e_nv.sum(-1))
        moment_n.mul_(shrink_n).add_(torch.linalg.vecdot(e_nv, z_nv))
        for group in chunk:
            if group.mean_nD is not None:
                _add_product(group.mean_nD.mul_(shrink_n.unsqueeze(-1)), e_nv, group.head.weight[tile])
        peaks.append(peak_n)
    picked_n = picked_n1.squeeze(-1)
    own_n = torch.exp(picked_n - peak_n)
    mass_n = others_n + own_n
    miss_n, total_n = others_n / mass_n, peak_n + mass_n.log()
    scores[0, tokens] = torch.where(miss_n < 0.5, torch.log1p(-miss_n), picked_n - total_n)
    scores[1, tokens] = total_n - (moment_n + own_n * picked_n) / mass_n
    for group in chunk:
        if group.mean_nD is not None:
            row_nD = group.head.weight[job.targets_N[tokens]].to(mass_n)
            by_mixed_nD = group.mean_nD.mul_(-1 / mass_n.unsqueeze(-1)).addcmul_(miss_n.unsqueeze(-1), row_nD)
            for factor_n1, by_hidden in zip(group.factors, group.by_hidden, strict=True):
                if by_hidden is not None:
                    torch.mul(factor_n1, by_mixed_nD, out=by_hidden[tokens])
    return [peak - total_n for peak in peaks], miss_n


def _gradients_of_heads(
    job: Job,
    chunk: list[_Group],
    tokens: slice,
    log_probs_N: Tensor,
    peaks: list[Tensor],
    miss_n: Tensor,
    masses_nV: Tensor,
    gradients: Gradients,
) -> None:
    """The loss's derivative by the logits is `c (1[target] - p)`; factors of a row move to the small side."""
    assert job.coefficients is not None
    coefficients_n = job.coefficients(log_probs_N[tokens], tokens).to(log_probs_N)
    for group in chunk:
        by_weight, by_bias = gradients.weight[group.members[0]], gradients.bias[group.members[0]]
        for tile, peak_n in zip(job.tiles, peaks, strict=True):
            share_n = -coefficients_n * peak_n.exp()
            if by_weight is not None:
                _add_product(by_weight[tile], masses_nV[:, tile].T, share_n.unsqueeze(-1) * group.hidden_nD)
            if by_bias is not None:
                by_bias[tile].addmv_(masses_nV[:, tile].T, share_n * group.factor_n)
        share_n = coefficients_n * miss_n
        if by_weight is not None:
            by_weight.index_add_(0, job.targets_N[tokens], share_n.unsqueeze(-1) * group.hidden_nD)
        if by_bias is not None:
            by_bias.index_add_(0, job.targets_N[tokens], share_n * group.factor_n)


def _by_head(heads: list[Head]) -> list[list[int]]:
    """Members that have one and the same head, together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, head in enumerate(heads):
        bias = None if head.bias is None else head.bias.data_ptr()
        groups.setdefault((head.weight.data_ptr(), head.weight.shape, bias, head.scale), []).append(k)
    return list(groups.values())


# --- any scheme, soft caps, and the gradient through the entropy -----------------------------------------------------


def _general(
    job: Job, hidden: list[Tensor], scores: Tensor, gradients: Gradients, grad_scores: tuple[Tensor, Tensor] | None
) -> None:
    """Whole rows of the vocabulary. The heads' products are ours, what follows up to the scores is autograd's."""
    wants = [
        any(g is not None for g in (gradients.hidden[k], gradients.weight[k], gradients.bias[k]))
        for k in range(len(hidden))
    ]
    # in rows of logits, what a member takes with autograd's intermediate results: about 6 with a gradient, 3 without
    for tokens in job.chunks(job.vocab_size * (3 * len(hidden) + 3 * sum(wants))):
        raw = [_raw_logits(job, head, h[tokens], scores) for head, h in zip(job.heads, hidden, strict=True)]
        leaves = [z.requires_grad_() for z, want in zip(raw, wants, strict=True) if want]
        weights = job.weights if job.weights.dim() == 1 else job.weights[tokens]
        with torch.set_grad_enabled(any(wants)):
            logits = [head.of_raw(z) for head, z in zip(job.heads, raw, strict=True)]
            mixed = mix_logits(logits, weights, job.scheme)
            chunk_scores = log_probs_and_entropy(mixed, job.targets_N[tokens], job.temperature)
        del logits, mixed
        for out, score in zip(scores, chunk_scores, strict=True):
            out[tokens] = score.detach()
        if not leaves:
            continue
        ones_n = torch.ones_like(scores[0, tokens])
        upstream = (ones_n, torch.zeros_like(ones_n)) if grad_scores is None else tuple(g[tokens] for g in grad_scores)
        slopes = iter(torch.autograd.grad(chunk_scores, leaves, upstream))
        coefficients_n = ones_n
        if gradients.of_heads and grad_scores is None:
            assert job.coefficients is not None
            coefficients_n = job.coefficients(scores[0, tokens], tokens).to(ones_n)
        for k, want in enumerate(wants):
            if want:
                _add_gradients(job, k, next(slopes), hidden[k], tokens, coefficients_n, gradients)


def _raw_logits(job: Job, head: Head, hidden_nD: Tensor, like: Tensor) -> Tensor:
    """The head's products and bias `[n, V]`, in the dtype of `like`."""
    z_nV = like.new_empty(len(hidden_nD), job.vocab_size)
    for tile in job.tiles:
        _add_product(z_nV[:, tile], hidden_nD, head.weight[tile].T, overwrite=True)
    return z_nV if head.bias is None else z_nV.add_(head.bias[: job.vocab_size])


def _add_gradients(
    job: Job, k: int, slope_nV: Tensor, hidden_ND: Tensor, tokens: slice, coefficients_n: Tensor, gradients: Gradients
) -> None:
    by_hidden, by_weight, by_bias = gradients.hidden[k], gradients.weight[k], gradients.bias[k]
    weighted_nD = hidden_ND[tokens].to(slope_nV) * coefficients_n.unsqueeze(-1)
    for tile in job.tiles:
        if by_hidden is not None:
            _add_product(by_hidden[tokens], slope_nV[:, tile], job.heads[k].weight[tile])
        if by_weight is not None:
            _add_product(by_weight[tile], slope_nV[:, tile].T, weighted_nD)
    if by_bias is not None:
        by_bias[: job.vocab_size].addmv_(slope_nV.T, coefficients_n)


def _add_product(out: Tensor, a: Tensor, b: Tensor, overwrite: bool = False) -> None:
    """`out += a @ b` (or `=`), accumulated in the dtype of `out`, whatever those of `a` and `b`."""
    beta = 0 if overwrite else 1
    low = next((x.dtype for x in (a, b) if x.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None and out.is_cuda:  # multiplied in bfloat16, added up in float32
        torch.addmm(out, a.to(low), b.to(low), beta=beta, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)
