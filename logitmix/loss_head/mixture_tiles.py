"""A mixture's logits for a chunk of tokens, a tile of the vocabulary at a time, without gradients.

Shape legend: K members, N tokens, n tokens of a chunk, V vocabulary, v tokens of a tile, D hidden width of a member.
"""

import torch
from torch import Tensor

from logitmix.loss_head.chunking import Gradients, LossHeadInputs
from logitmix.loss_head.linear_pass import HeadGroup, group_by_head
from logitmix.loss_head.matmul import multiply
from logitmix.mixture.mixing import mix_logits


class SumExp:
    """A running `log Σ exp z` of each token over tiles of the vocabulary."""

    def __init__(self, tokens: int, like: Tensor) -> None:
        # finite, since a tile may hold -inf only
        self.peak_n = like.new_full((tokens,), torch.finfo(like.dtype).min)
        self.sum_n = like.new_zeros(tokens)

    def add(self, z_nv: Tensor) -> None:
        higher_n = torch.maximum(self.peak_n, z_nv.amax(-1))
        self.sum_n.mul_(torch.exp(self.peak_n - higher_n)).add_(torch.sub(z_nv, higher_n.unsqueeze(-1)).exp_().sum(-1))
        self.peak_n = higher_n

    def log(self) -> Tensor:
        return self.peak_n + self.sum_n.log()


class MixtureTiles:
    """The logits of the mixture `inputs`, divided by its temperature, at the tokens of a chunk.

    For the scheme "logit" each tile is made when it is asked for: by the products of `HeadGroup` where all is linear,
    otherwise from the members' own logits. The scheme "prob" needs the members' normalisers first, so it holds the
    members' logits of the chunk, `[K, n, V]`.
    """

    def __init__(self, inputs: LossHeadInputs, hidden: list[Tensor], tokens: slice, like: Tensor) -> None:
        self.inputs, self.hidden, self.tokens, self.like = inputs, hidden, tokens, like
        self.groups: list[HeadGroup] = []
        if is_linear(inputs):
            without = [None] * len(hidden)
            none = Gradients(list(without), list(without), list(without))
            self.groups = [HeadGroup(inputs, m, hidden, tokens, none, like) for m in group_by_head(inputs.heads)]
        elif inputs.scheme == "prob":
            self._normalise()

    def write(self, out_nv: Tensor, tile: slice) -> None:
        """Write the tile's logits into `out_nv`."""
        if self.groups:
            first, *rest = self.groups
            out_nv.copy_(first.logits(tile))
            for group in rest:
                group.add_logits(out_nv, tile)
            return
        if self.inputs.scheme == "prob":
            self._write_log_probs(out_nv, tile)
        else:
            weights = self.inputs.weights if self.inputs.weights.dim() == 1 else self.inputs.weights[self.tokens]
            logits = [self._member(k, tile) for k in range(len(self.hidden))]
            out_nv.copy_(mix_logits(logits, weights))
        if self.inputs.temperature != 1.0:
            out_nv.div_(self.inputs.temperature)

    def _member(self, k: int, tile: slice) -> Tensor:
        """Logits `[n, v]` of a member."""
        head = self.inputs.heads[k]
        z_nv = multiply(self.hidden[k][self.tokens], head.weight[tile].T, self.like.dtype, self.inputs.half_dtype)
        return head.transform(z_nv if head.bias is None else z_nv.add_(head.bias[tile].to(z_nv)))

    def _normalise(self) -> None:
        """Compute `log w_k - log Σ exp z_k` of each member, `[n, 1]`, and its logits."""
        n = self.tokens.stop - self.tokens.start
        self.logits_KnV = self.like.new_empty(len(self.hidden), n, self.inputs.vocab_size)
        self.offsets = []
        for k, z_nV in enumerate(self.logits_KnV):
            total = SumExp(n, self.like)
            for tile in self.inputs.tiles:
                z_nV[:, tile] = self._member(k, tile)
                total.add(z_nV[:, tile])
            weight_n1 = self.inputs.member_weights(k, self.tokens, self.like)
            # where the weight is 0 the logits do not count, even if they are infinite or NaN
            z_nV[(weight_n1 == 0).squeeze(-1)] = -torch.inf
            self.offsets.append((weight_n1.log() - total.log().unsqueeze(-1)).masked_fill_(weight_n1 == 0, 0.0))

    def _write_log_probs(self, out_nv: Tensor, tile: slice) -> None:
        """`log Σ_k w_k softmax(z_k)`."""
        torch.add(self.logits_KnV[0, :, tile], self.offsets[0], out=out_nv)
        for z_nV, offset_n1 in zip(self.logits_KnV[1:], self.offsets[1:], strict=True):
            torch.logaddexp(out_nv, z_nV[:, tile].add_(offset_n1), out=out_nv)


def is_linear(inputs: LossHeadInputs) -> bool:
    """Whether the mixture's logits are sums of finite matrix products, of hidden states that are mixed before them."""
    if inputs.scheme != "logit" or any(head.softcap is not None for head in inputs.heads):
        return False
    # a weight of 0, or below, would turn a bias of -inf into NaN, or into +inf
    return all(head.bias is None or bool(torch.isfinite(head.bias).all()) for head in inputs.heads)
