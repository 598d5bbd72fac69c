"""The mixture's diagnostics tile by tile, for the linear pass of the fused loss head.

Shape legend: K members, n tokens of a chunk, v vocabulary of a tile.
"""

import torch
from torch import Tensor

from logitmix.mixture.diagnostics import MixtureDiagnostics


class TiledDiagnostics:
    """What `mixture_diagnostics` finds in whole rows of logits, from one tile after another.

    `KL(mixture || member k) = sum_v p_v (z_v - z_kv) - log sum exp z + log sum exp z_k`, all sums running ones.
    """

    def __init__(self, num_members: int, like: Tensor, tile_width: int) -> None:
        K, n = num_members, len(like)
        self.members = like.new_empty(K, n, tile_width)  # the caller fills them with the members' logits
        self._peak_Kn = like.new_full((K, n), -torch.inf)
        self._mass_Kn, self._cross_Kn = like.new_zeros(K, n), like.new_zeros(K, n)
        # of the mixture, then of each member: the largest logit so far, and its token
        self._best = [(torch.full_like(like, -torch.inf), torch.zeros_like(like, dtype=torch.long))] * (K + 1)

    def read(self, start: int, z_nv: Tensor, e_nv: Tensor, shrink_n: Tensor) -> None:
        """Take in a tile that starts at token `start`: its mixed logits, their masses `exp(z - peak)`, and by how much
        a new peak shrinks the masses before it. The members' logits are used up."""
        members = self.members[..., : z_nv.shape[1]]
        for i, z in enumerate((z_nv, *members)):
            value, at = z.max(-1)
            best, where = self._best[i]
            is_higher = value > best
            self._best[i] = torch.where(is_higher, value, best), torch.where(is_higher, at + start, where)
        for k, z_nv in enumerate(members):
            self._cross_Kn[k].mul_(shrink_n).add_(torch.linalg.vecdot(e_nv, z_nv))
            peak_n = self._best[k + 1][0]
            self._mass_Kn[k].mul_(torch.exp(self._peak_Kn[k] - peak_n))
            self._mass_Kn[k].add_(z_nv.sub_(peak_n.unsqueeze(-1)).exp_().sum(-1))
            self._peak_Kn[k] = peak_n

    def result(self, entropy_n: Tensor, mass_n: Tensor) -> MixtureDiagnostics:
        """The diagnostics, given the mixture's entropies and the sums of its masses."""
        total_Kn = self._peak_Kn + self._mass_Kn.log()
        winner, policy, *anchors = (token for _, token in self._best)
        disagree = torch.stack([anchor != policy for anchor in anchors]).any(0)
        by_policy, by_anchor = winner == policy, torch.stack([winner == anchor for anchor in anchors]).any(0)
        return MixtureDiagnostics(
            kl_K=(total_Kn - self._cross_Kn / mass_n - entropy_n).clamp(min=0).T,
            disagree=disagree,
            policy_wins=disagree & by_policy,
            anchor_wins=disagree & by_anchor & ~by_policy,
        )
