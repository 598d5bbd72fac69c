"""How far a mixture is from its members, token by token.

Shape legend: K members (the policy first), V vocabulary, `...` any axes before it (batch and time, or tokens).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MixtureDiagnostics(NamedTuple):
    """Per token. The three booleans concern greedy decoding; each of the last two implies the first.

    - `kl_K`, `[..., K]`: `KL(mixture ‖ member k)` in nats, between the distributions at the sampling temperature;
    - `disagree`, `[...]`: the most probable token of some anchor differs from the policy's;
    - `policy_wins`, `[...]`: the members disagree and the mixture's most probable token is the policy's;
    - `anchor_wins`, `[...]`: the members disagree and it is an anchor's. If neither wins, it is a third token.
    """

    kl_K: Tensor
    disagree: Tensor
    policy_wins: Tensor
    anchor_wins: Tensor

    @classmethod
    def from_top_tokens(cls, kl_K: Tensor, mixture: Tensor, members: Sequence[Tensor]) -> "MixtureDiagnostics":
        """Diagnostics from the divergences and the most probable tokens `[...]` of the mixture and its members."""
        policy, *anchors = members
        disagree = torch.stack([anchor != policy for anchor in anchors]).any(0)
        is_policys = mixture == policy
        is_anchors = torch.stack([mixture == anchor for anchor in anchors]).any(0)
        return cls(kl_K, disagree, disagree & is_policys, disagree & is_anchors & ~is_policys)


@torch.no_grad()
def mixture_diagnostics(logits: Sequence[Tensor], mixed: Tensor, temperature: float = 1.0) -> MixtureDiagnostics:
    """Diagnostics of `mixed = mix_logits(logits, weights, scheme)`, `[..., V]`, and its K members, `[..., V]` each.

        KL(mixture ‖ member k) = Σ_v p_v · (log p_v - log softmax(z_k / T)_v)      with p = softmax(mixed / T)

    Exact, over the whole vocabulary, in the dtype of `mixed`; infinite if the member rules out a token that the
    mixture does not. Temperature 1 compares the models' own distributions, another what would be sampled.
    Takes one exponential of the vocabulary per distribution and keeps nothing for a backward pass.

    Every member must have run: a member skipped at weight 0 has no logits to compare with.
    """
    log_mixture = _log_softmax(mixed, temperature)
    probabilities = log_mixture.exp()
    ruled_out = probabilities == 0  # the difference may be inf or NaN there, and must count as 0
    kls = []
    for z in logits:
        gap = log_mixture - _log_softmax(z.to(mixed.dtype), temperature)
        kls.append(gap.masked_fill_(ruled_out, 0.0).mul_(probabilities).sum(-1))
    kl_K = torch.stack(kls, dim=-1).clamp(min=0)  # rounding can make it slightly negative
    return MixtureDiagnostics.from_top_tokens(kl_K, mixed.argmax(-1), [z.argmax(-1) for z in logits])


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z if temperature == 1 else z / temperature, dim=-1)
