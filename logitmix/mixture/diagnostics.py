"""How far a mixture stands from its members, token by token.

Shape legend: K members (the policy first), V vocabulary, `...` any axes before it (batch and time, or tokens).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MixtureDiagnostics(NamedTuple):
    """Per token; the three booleans are about greedy decoding, and the last two imply the first.

    - `kl_K`, `[..., K]`: `KL(mixture ‖ member k)` in nats, of the distributions at the temperature of sampling;
    - `disagree`, `[...]`: the policy's most probable token is not that of every anchor;
    - `policy_wins`, `[...]`: and the mixture's is the policy's;
    - `anchor_wins`, `[...]`: and the mixture's is an anchor's. Where neither wins, it is a third token.
    """

    kl_K: Tensor
    disagree: Tensor
    policy_wins: Tensor
    anchor_wins: Tensor


@torch.no_grad()
def mixture_diagnostics(logits: Sequence[Tensor], mixed: Tensor, temperature: float = 1.0) -> MixtureDiagnostics:
    """Diagnostics of `mixed = mix_logits(logits, weights, scheme)`, `[..., V]`, beside its K members, `[..., V]` each.

        KL(mixture ‖ member k) = Σ_v p_v · (log p_v - log softmax(z_k / T)_v)      with p = softmax(mixed / T)

    Exact, over the whole vocabulary, in the dtype of `mixed`; infinite where the member rules out a token that the
    mixture does not. A temperature of 1 is the models' own distributions; another compares what would be sampled.
    Takes one exponential of the vocabulary a distribution, and keeps nothing for a backward pass.

    Every member must have been run: one that was left out at weight 0 has no logits to compare with.
    """
    log_mixture = _log_softmax(mixed, temperature)
    probabilities = log_mixture.exp()
    ruled_out = probabilities == 0  # there the difference may be inf or NaN, and counts nothing
    kls = []
    for z in logits:
        gap = log_mixture - _log_softmax(z.to(mixed.dtype), temperature)
        kls.append(gap.masked_fill_(ruled_out, 0.0).mul_(probabilities).sum(-1))
    winner, policy, *anchors = (z.argmax(-1) for z in (mixed, *logits))
    disagree = torch.stack([anchor != policy for anchor in anchors]).any(0)
    by_policy = winner == policy
    by_anchor = torch.stack([winner == anchor for anchor in anchors]).any(0)
    return MixtureDiagnostics(
        kl_K=torch.stack(kls, dim=-1).clamp(min=0),  # rounding alone can bring it below
        disagree=disagree,
        policy_wins=disagree & by_policy,
        anchor_wins=disagree & by_anchor & ~by_policy,
    )


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z if temperature == 1 else z / temperature, dim=-1)
