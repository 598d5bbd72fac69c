"""The linear pass of the fused loss head: the scheme "logit" without soft caps.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v tokens of a tile, D hidden width of a member.

The mixture's logits are then linear in the hidden states: `sum_k (w_k scale_k / T) (W_k h_k + b_k)`. One pass over
tiles of the vocabulary keeps a running maximum and the sums relative to it (Milakov & Gimelshein, arXiv 1805.02867),
among them the mean of the head's rows under the mixture, as attention keeps that of its values. Only the gradient of
the heads needs the probabilities of a whole chunk.
"""

import torch
from torch import Tensor

from logitmix.loss_head.chunking import Gradients, LossHeadInputs
from logitmix.loss_head.diagnostics import TiledDiagnostics
from logitmix.loss_head.matmul import add_product, multiply
from logitmix.mixture.head import Head


class HeadGroup:
    """Members whose hidden states are mixed before the head that they share, for a chunk of tokens."""

    def __init__(
        self,
        inputs: LossHeadInputs,
        members: list[int],
        hidden: list[Tensor],
        tokens: slice,
        gradients: Gradients,
        like: Tensor,
    ) -> None:
        self.members, self.head, self.half_dtype = members, inputs.heads[members[0]], inputs.half_dtype
        # w_k scale / T of each member, [n, 1]
        scale = self.head.scale / inputs.temperature
        self.factors = [inputs.member_weights(k, tokens, like) * scale for k in members]
        mixed, total = torch.zeros((), dtype=like.dtype, device=like.device), torch.zeros_like(self.factors[0])
        for k, factor in zip(members, self.factors, strict=True):
            mixed, total = mixed + factor * hidden[k][tokens].to(like.dtype), total + factor
        self.hidden_nD, self.factor_n = mixed, total.squeeze(-1)
        self.grad_hidden = [gradients.hidden[k] for k in members]
        # sum over the tokens other than the target of their mass times their row of the head
        self.row_sum_nD = torch.zeros_like(mixed) if any(g is not None for g in self.grad_hidden) else None

    def logits(self, tile: slice) -> Tensor:
        """The contribution of these members to the mixture's logits of a tile, `[n, v]`."""
        z_nv = multiply(self.hidden_nD, self.head.weight[tile].T, self.hidden_nD.dtype, self.half_dtype)
        return self._add_bias(z_nv, tile)

    def add_logits(self, z_nv: Tensor, tile: slice) -> None:
        """`z_nv += logits(tile)`."""
        add_product(z_nv, self.hidden_nD, self.head.weight[tile].T, self.half_dtype, "logits")
        self._add_bias(z_nv, tile)

    def _add_bias(self, z_nv: Tensor, tile: slice) -> Tensor:
        return z_nv if self.head.bias is None else z_nv.addr_(self.factor_n, self.head.bias[tile].to(z_nv))


def run_linear(inputs: LossHeadInputs, hidden: list[Tensor], scores: Tensor, gradients: Gradients) -> None:
    """Fill in `scores` (log-probs and entropies, `[2, N]`) and `gradients`."""
    groups = group_by_head(inputs.heads) if inputs.share_products else [[k] for k in range(len(inputs.heads))]
    keep_masses = gradients.reach_heads
    columns = inputs.vocab_size if keep_masses else inputs.tile_width
    chunks = list(inputs.chunks(columns, least=128))
    masses = scores.new_empty(max(chunk.stop - chunk.start for chunk in chunks), columns)
    for tokens in chunks:
        n = tokens.stop - tokens.start
        chunk = [HeadGroup(inputs, members, hidden, tokens, gradients, scores[0]) for members in groups]
        peaks, miss_n = _scan_vocabulary(inputs, chunk, tokens, scores, masses[:n], keep_masses)
        if keep_masses:
            _add_head_gradients(inputs, chunk, tokens, scores[0], peaks, miss_n, masses[:n], gradients)


def _scan_vocabulary(
    inputs: LossHeadInputs, chunk: list[HeadGroup], tokens: slice, scores: Tensor, masses: Tensor, keep_masses: bool
) -> tuple[list[Tensor], Tensor]:
    """Fill in the chunk's scores, its gradients by hidden states and, with `keep_masses`, its masses `[n, V]`.

    The masses of a tile are `exp(z - peak)` with the largest logit up to that tile. Returned are these peaks minus
    `log sum exp z`, whose `exp` turns the masses into probabilities, and `1 - p(target)`. The target's own mass is
    left out of the masses, so that `1 - p(target)` is a sum of small numbers instead of a difference of large ones:
    a token of probability close to 1 keeps its log-prob and its gradient.
    """
    targets_n1 = inputs.targets_N[tokens].unsqueeze(-1)
    peak_n = torch.full_like(scores[0, tokens], -torch.inf)
    others_n, moment_n, target_z_n1 = torch.zeros_like(peak_n), torch.zeros_like(peak_n), peak_n.unsqueeze(-1)
    diagnostics = None if inputs.diagnostics is None else TiledDiagnostics(len(chunk), peak_n, inputs.tile_width)
    peaks = []
    for tile in inputs.tiles:
        z_nv = _mix_tile(inputs, chunk, tokens, tile, diagnostics)
        higher_n = torch.maximum(peak_n, z_nv.amax(-1))
        shrink_n, peak_n = torch.exp(peak_n - higher_n), higher_n
        e_nv = masses[:, tile] if keep_masses else masses[:, : tile.stop - tile.start]
        torch.sub(z_nv, peak_n.unsqueeze(-1), out=e_nv).exp_()
        if diagnostics is not None:
            diagnostics.update(tile.start, z_nv, e_nv, shrink_n)
        at_n1 = (targets_n1 - tile.start).clamp(0, tile.stop - tile.start - 1)
        is_here_n1 = (targets_n1 >= tile.start) & (targets_n1 < tile.stop)
        target_z_n1 = torch.where(is_here_n1, z_nv.gather(1, at_n1), target_z_n1)
        e_nv.scatter_(1, at_n1, e_nv.gather(1, at_n1).masked_fill_(is_here_n1, 0.0))
        others_n.mul_(shrink_n).add_(e_nv.sum(-1))
        moment_n.mul_(shrink_n).add_(torch.linalg.vecdot(e_nv, z_nv))
        for group in chunk:
            if group.row_sum_nD is not None:
                group.row_sum_nD.mul_(shrink_n.unsqueeze(-1))
                add_product(group.row_sum_nD, e_nv, group.head.weight[tile], inputs.half_dtype, "hidden_gradient")
        peaks.append(peak_n)
    target_z_n = target_z_n1.squeeze(-1)
    target_mass_n = torch.exp(target_z_n - peak_n)
    mass_n = others_n + target_mass_n
    miss_n, logsumexp_n = others_n / mass_n, peak_n + mass_n.log()
    scores[0, tokens] = torch.where(miss_n < 0.5, torch.log1p(-miss_n), target_z_n - logsumexp_n)
    scores[1, tokens] = logsumexp_n - (moment_n + target_mass_n * target_z_n) / mass_n
    if diagnostics is not None:
        assert inputs.diagnostics is not None
        inputs.diagnostics.append(diagnostics.compute(scores[1, tokens], mass_n))
    for group in chunk:
        if group.row_sum_nD is not None:
            # d log p(target) / d h = factor * ((1 - p(target)) W[target] - sum of p_v W_v over the other tokens v)
            row_nD = group.head.weight[inputs.targets_N[tokens]].to(mass_n)
            grad_nD = group.row_sum_nD.mul_(-1 / mass_n.unsqueeze(-1)).addcmul_(miss_n.unsqueeze(-1), row_nD)
            for factor_n1, grad_hidden in zip(group.factors, group.grad_hidden, strict=True):
                if grad_hidden is not None:
                    torch.mul(factor_n1, grad_nD, out=grad_hidden[tokens])
    return [peak - logsumexp_n for peak in peaks], miss_n


def _mix_tile(
    inputs: LossHeadInputs, chunk: list[HeadGroup], tokens: slice, tile: slice, diagnostics: TiledDiagnostics | None
) -> Tensor:
    """The mixture's logits of a tile, `[n, v]`. Writes the members' own logits into `diagnostics.members`."""
    z_nv = chunk[0].logits(tile)
    if diagnostics is None:
        for group in chunk[1:]:
            group.add_logits(z_nv, tile)
        return z_nv
    members_Knv = diagnostics.members[..., : tile.stop - tile.start]
    members_Knv[0] = z_nv
    for k, group in enumerate(chunk[1:], 1):
        members_Knv[k] = group.logits(tile)
        z_nv.add_(members_Knv[k])
    for k, member_nv in enumerate(members_Knv):
        member_nv.div_(inputs.member_weights(k, tokens, member_nv))
    return z_nv


def _add_head_gradients(
    inputs: LossHeadInputs,
    chunk: list[HeadGroup],
    tokens: slice,
    log_probs_N: Tensor,
    peaks: list[Tensor],
    miss_n: Tensor,
    masses_nV: Tensor,
    gradients: Gradients,
) -> None:
    """Add the chunk's part to the gradients of the heads: the loss's derivative by the logits is `c (1[target] - p)`.

    Factors of a token multiply the `[n, D]` hidden states, not the `[n, V]` masses.
    """
    assert inputs.coefficients is not None
    coefficients_n = inputs.coefficients(log_probs_N[tokens], tokens).to(log_probs_N)
    for group in chunk:
        grad_weight, grad_bias = gradients.weight[group.members[0]], gradients.bias[group.members[0]]
        for tile, peak_n in zip(inputs.tiles, peaks, strict=True):
            factor_n = -coefficients_n * peak_n.exp()
            if grad_weight is not None:
                scaled_nD = factor_n.unsqueeze(-1) * group.hidden_nD
                add_product(grad_weight[tile], masses_nV[:, tile].T, scaled_nD, inputs.half_dtype, "weight_gradient")
            if grad_bias is not None:
                grad_bias[tile].addmv_(masses_nV[:, tile].T, factor_n * group.factor_n)
        factor_n = coefficients_n * miss_n
        if grad_weight is not None:
            grad_weight.index_add_(0, inputs.targets_N[tokens], factor_n.unsqueeze(-1) * group.hidden_nD)
        if grad_bias is not None:
            grad_bias.index_add_(0, inputs.targets_N[tokens], factor_n * group.factor_n)


def group_by_head(heads: list[Head]) -> list[list[int]]:
    """The members of each distinct head."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for k, head in enumerate(heads):
        bias = None if head.bias is None else head.bias.data_ptr()
        groups.setdefault((head.weight.data_ptr(), head.weight.shape, bias, head.scale), []).append(k)
    return list(groups.values())
