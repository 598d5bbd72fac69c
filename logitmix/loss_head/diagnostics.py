"""The mixture's diagnostics, tile by tile, for the linear pass of the fused loss head.

Shape legend: K members, n tokens of a chunk, v vocabulary of a tile.
"""

import torch
from torch import Tensor

from logitmix.mixture.diagnostics import MixtureDiagnostics


class TiledDiagnostics:
    """`mixture_diagnostics` without whole rows of logits: running sums and maxima over the tiles of the vocabulary.

    KL(mixture || member k) = sum_v p_v (z_v - z_kv) - log sum exp z + log sum exp z_k
    """

    def __init__(self, num_members: int, like: Tensor, tile_width: int) -> None:
        K, n = num_members, len(like)
        self.members = like.new_empty(K, n, tile_width)  # the caller writes the members' logits of a tile here
        self._peak_Kn = like.new_full((K, n), -torch.inf)
        self._mass_Kn, self._cross_Kn = like.new_zeros(K, n), like.new_zeros(K, n)
        # the largest logit so far and its token: of the mixture, then of each member
        self._best = [(torch.full_like(like, -torch.inf), torch.zeros_like(like, dtype=torch.long))] * (K + 1)

    def update(self, start: int, z_nv: Tensor, e_nv: Tensor, shrink_n: Tensor) -> None:
        """Add the tile that starts at vocabulary row `start`. Overwrites `members`.

        Args:
            z_nv: the mixture's logits.
            e_nv: their masses `exp(z - peak)`.
            shrink_n: `exp(previous peak - peak)`, which rescales the sums so far.
        """
        members = self.members[..., : z_nv.shape[1]]
        for i, z in enumerate((z_nv, *members)):
            value, at = z.max(-1)
            best, where = self._best[i]
            is_higher = value > best
            self._best[i] = torch.where(is_higher, value, best), torch.where(is_higher, at + start, where)
        for k, member_nv in enumerate(members):
            self._cross_Kn[k].mul_(shrink_n).add_(torch.linalg.vecdot(e_nv, member_nv))
            peak_n = self._best[k + 1][0]
            self._mass_Kn[k].mul_(torch.exp(self._peak_Kn[k] - peak_n))
            self._mass_Kn[k].add_(member_nv.sub_(peak_n.unsqueeze(-1)).exp_().sum(-1))
            self._peak_Kn[k] = peak_n

    def compute(self, entropy_n: Tensor, mass_n: Tensor) -> MixtureDiagnostics:
        """The diagnostics, from the mixture's entropies and the sums of its masses."""
        logsumexp_Kn = self._peak_Kn + self._mass_Kn.log()
        kl_nK = (logsumexp_Kn - self._cross_Kn / mass_n - entropy_n).clamp(min=0).T
        mixture, *members = (token for _, token in self._best)
        return MixtureDiagnostics.from_top_tokens(kl_nK, mixture, members)
