"""The linear pass of the fused loss head: the scheme "logit" without soft caps.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v of a tile, D width of a member's hidden states.

The mixture's logits are then one linear map of the hidden states, `sum_k (w_k scale_k / T) (W_k h_k + b_k)`. One pass
over tiles of the vocabulary keeps a running maximum and sums under it (Milakov & Gimelshein, arXiv 1805.02867), and
with them the mean of the heads' rows under the mixture, as attention does. Only the heads' gradient needs the
probabilities of a whole chunk.
"""

import torch
from torch import Tensor

from logitmix.loss_head.chunking import Gradients, LossHeadInputs, add_product, multiply
from logitmix.loss_head.diagnostics import TiledDiagnostics
from logitmix.mixture.head import Head


class _Group:
    """Members of one head, for a chunk of tokens: they are mixed before the head."""

    def __init__(
        self,
        inputs: LossHeadInputs,
        members: list[int],
        hidden: list[Tensor],
        tokens: slice,
        gradients: Gradients,
        like: Tensor,
    ) -> None:
        self.members, self.head, self.half = members, inputs.heads[members[0]], inputs.half
        # each member's factor on its products, [n, 1]
        self.factors = [inputs.weights_of(k, tokens, like) * (self.head.scale / inputs.temperature) for k in members]
        mixed, total = torch.zeros((), dtype=like.dtype, device=like.device), torch.zeros_like(self.factors[0])
        for k, factor in zip(members, self.factors, strict=True):
            mixed, total = mixed + factor * hidden[k][tokens].to(like.dtype), total + factor
        self.hidden_nD, self.factor_n = mixed, total.squeeze(-1)
        self.by_hidden = [gradients.hidden[k] for k in members]
        # the mean of the head's rows under the mixture, the target's row left out, times the mass
        self.mean_nD = torch.zeros_like(mixed) if any(g is not None for g in self.by_hidden) else None

    def logits(self, tile: slice) -> Tensor:
        """The members' part of the mixture's logits, `[n, v]`."""
        z_nv = multiply(self.hidden_nD, self.head.weight[tile].T, self.hidden_nD.dtype, self.half)
        return self._with_bias(z_nv, tile)

    def add_logits(self, z_nv: Tensor, tile: slice) -> None:
        """Add them to `z_nv`."""
        add_product(z_nv, self.hidden_nD, self.head.weight[tile].T, self.half)
        self._with_bias(z_nv, tile)

    def _with_bias(self, z_nv: Tensor, tile: slice) -> Tensor:
        return z_nv if self.head.bias is None else z_nv.addr_(self.factor_n, self.head.bias[tile].to(z_nv))


def run_linear(inputs: LossHeadInputs, hidden: list[Tensor], scores: Tensor, gradients: Gradients) -> None:
    """Fill in `scores` (log-probs and entropies, `[2, N]`) and `gradients`."""
    # to compare members, each one's logits are needed
    groups = _by_head(inputs.heads) if inputs.diagnostics is None else [[k] for k in range(len(inputs.heads))]
    keeps = gradients.of_heads
    chunks = list(inputs.chunks(inputs.vocab_size if keeps else inputs.tile_width, least=128))
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    masses = scores.new_empty(rows, inputs.vocab_size if keeps else inputs.tile_width)
    for tokens in chunks:
        n = tokens.stop - tokens.start
        chunk = [_Group(inputs, members, hidden, tokens, gradients, scores[0]) for members in groups]
        peaks, miss_n = _read_vocabulary(inputs, chunk, tokens, scores, masses[:n], keeps)
        if keeps:
            _gradients_of_heads(inputs, chunk, tokens, scores[0], peaks, miss_n, masses[:n], gradients)


def _read_vocabulary(
    inputs: LossHeadInputs, chunk: list[_Group], tokens: slice, scores: Tensor, masses: Tensor, keeps: bool
) -> tuple[list[Tensor], Tensor]:
    """Fill in the chunk's scores and its gradients by hidden states, and with `keeps` also `masses` `[n, V]`.

    `masses` are `exp(z - peak)` with the peak known at each tile, which is returned relative to `log sum exp z`: the
    probabilities of a tile are its masses times `exp` of that. The target's own mass is left out of them, so that
    `1 - p(target)`, returned as well, is a sum of small numbers, not a small difference: a token that is all but
    certain keeps its log-prob and its gradient.
    """
    targets_n1 = inputs.targets_N[tokens].unsqueeze(-1)
    peak_n = torch.full_like(scores[0, tokens], -torch.inf)
    others_n, moment_n, picked_n1 = torch.zeros_like(peak_n), torch.zeros_like(peak_n), peak_n.unsqueeze(-1)
    diagnostics = None if inputs.diagnostics is None else TiledDiagnostics(len(chunk), peak_n, inputs.tile_width)
    peaks = []
    for tile in inputs.tiles:
        z_nv = _mixed_logits(inputs, chunk, tokens, tile, diagnostics)
        higher_n = torch.maximum(peak_n, z_nv.amax(-1))
        shrink_n, peak_n = torch.exp(peak_n - higher_n), higher_n
        e_nv = masses[:, tile] if keeps else masses[:, : tile.stop - tile.start]
        torch.sub(z_nv, peak_n.unsqueeze(-1), out=e_nv).exp_()
        if diagnostics is not None:
            diagnostics.read(tile.start, z_nv, e_nv, shrink_n)
        at_n1 = (targets_n1 - tile.start).clamp(0, tile.stop - tile.start - 1)
        is_here_n1 = (targets_n1 >= tile.start) & (targets_n1 < tile.stop)
        picked_n1 = torch.where(is_here_n1, z_nv.gather(1, at_n1), picked_n1)
        e_nv.scatter_(1, at_n1, e_nv.gather(1, at_n1).masked_fill_(is_here_n1, 0.0))
        others_n.mul_(shrink_n).add_(e_nv.sum(-1))
        moment_n.mul_(shrink_n).add_(torch.linalg.vecdot(e_nv, z_nv))
        for group in chunk:
            if group.mean_nD is not None:
                add_product(group.mean_nD.mul_(shrink_n.unsqueeze(-1)), e_nv, group.head.weight[tile], inputs.half)
        peaks.append(peak_n)
    picked_n = picked_n1.squeeze(-1)
    own_n = torch.exp(picked_n - peak_n)
    mass_n = others_n + own_n
    miss_n, total_n = others_n / mass_n, peak_n + mass_n.log()
    scores[0, tokens] = torch.where(miss_n < 0.5, torch.log1p(-miss_n), picked_n - total_n)
    scores[1, tokens] = total_n - (moment_n + own_n * picked_n) / mass_n
    if diagnostics is not None:
        assert inputs.diagnostics is not None
        inputs.diagnostics.append(diagnostics.result(scores[1, tokens], mass_n))
    for group in chunk:
        if group.mean_nD is not None:
            row_nD = group.head.weight[inputs.targets_N[tokens]].to(mass_n)
            by_mixed_nD = group.mean_nD.mul_(-1 / mass_n.unsqueeze(-1)).addcmul_(miss_n.unsqueeze(-1), row_nD)
            for factor_n1, by_hidden in zip(group.factors, group.by_hidden, strict=True):
                if by_hidden is not None:
                    torch.mul(factor_n1, by_mixed_nD, out=by_hidden[tokens])
    return [peak - total_n for peak in peaks], miss_n


def _mixed_logits(
    inputs: LossHeadInputs, chunk: list[_Group], tokens: slice, tile: slice, diagnostics: TiledDiagnostics | None
) -> Tensor:
    """The mixture's logits of a tile `[n, v]`; the members' own are left with the diagnostics."""
    z_nv = chunk[0].logits(tile)
    if diagnostics is None:
        for group in chunk[1:]:
            group.add_logits(z_nv, tile)
        return z_nv
    own_Knv = diagnostics.members[..., : tile.stop - tile.start]
    own_Knv[0] = z_nv
    for k, group in enumerate(chunk[1:], 1):
        own_Knv[k] = group.logits(tile)
        z_nv.add_(own_Knv[k])
    for k, own_nv in enumerate(own_Knv):
        own_nv.div_(inputs.weights_of(k, tokens, own_nv))
    return z_nv


def _gradients_of_heads(
    inputs: LossHeadInputs,
    chunk: list[_Group],
    tokens: slice,
    log_probs_N: Tensor,
    peaks: list[Tensor],
    miss_n: Tensor,
    masses_nV: Tensor,
    gradients: Gradients,
) -> None:
    """The loss's derivative by the logits is `c (1[target] - p)`; factors of a row move to the small side."""
    assert inputs.coefficients is not None
    coefficients_n = inputs.coefficients(log_probs_N[tokens], tokens).to(log_probs_N)
    for group in chunk:
        by_weight, by_bias = gradients.weight[group.members[0]], gradients.bias[group.members[0]]
        for tile, peak_n in zip(inputs.tiles, peaks, strict=True):
            share_n = -coefficients_n * peak_n.exp()
            if by_weight is not None:
                add_product(
                    by_weight[tile], masses_nV[:, tile].T, share_n.unsqueeze(-1) * group.hidden_nD, inputs.half
                )
            if by_bias is not None:
                by_bias[tile].addmv_(masses_nV[:, tile].T, share_n * group.factor_n)
        share_n = coefficients_n * miss_n
        if by_weight is not None:
            by_weight.index_add_(0, inputs.targets_N[tokens], share_n.unsqueeze(-1) * group.hidden_nD)
        if by_bias is not None:
            by_bias.index_add_(0, inputs.targets_N[tokens], share_n * group.factor_n)


def _by_head(heads: list[Head]) -> list[list[int]]:
    """Members that have one and the same head, together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, head in enumerate(heads):
        bias = None if head.bias is None else head.bias.data_ptr()
        groups.setdefault((head.weight.data_ptr(), head.weight.shape, bias, head.scale), []).append(k)
    return list(groups.values())
