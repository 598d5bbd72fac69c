"""Drafting and verifying tokens: speculative sampling, greedy or sampled, under the processors of `generate`.

Shape legend: B sequences, L slots for tokens, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from logitmix.mixture.decoding.ragged import process_logits


class SpeculativeSampler:
    """Draws tokens as `generate` does, from logits processed by `logits_processor`; the most probable if greedy.

    All methods take the tokens before the one to draw, `tokens_BL`, of which the first `length_B` count.
    """

    def __init__(self, logits_processor: LogitsProcessorList, is_greedy: bool) -> None:
        self._processor, self._is_greedy = logits_processor, is_greedy

    def sample(self, logits_BV: Tensor, tokens_BL: Tensor, length_B: Tensor) -> Tensor:
        """Tokens `[B]`."""
        return self._choose(self._log_probs(logits_BV, tokens_BL, length_B))

    def draft(self, logits_BV: Tensor, tokens_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` from a member's own logits, and the log-probabilities `log q`, `[B, V]`, that drew them.

        A row without a distribution (NaN, +inf, or -inf everywhere) drafts uniformly: any q is exact, and the mixture
        may ignore this member.
        """
        logits_BV = make_finite(logits_BV)
        log_q_BV = make_finite(self._log_probs(logits_BV, tokens_BL, length_B))
        return self._choose(log_q_BV), log_q_BV

    def verify(
        self, logits_BV: Tensor, drafts_B: Tensor, log_q_BV: Tensor, tokens_BL: Tensor, length_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether the target of these logits accepts each draft, `[B]`, and the next tokens, `[B]`.

        With m the target's distribution: accepted with probability `min(1, m(d) / q(d))`, else drawn from the residual
        distribution `max(m - q, 0)`, normalised. The token is distributed as m. Greedy: the argmax of m.
        """
        log_m_BV = self._log_probs(logits_BV, tokens_BL, length_B)
        if self._is_greedy:
            tokens_B = self._choose(log_m_BV)
            return tokens_B == drafts_B, tokens_B
        m_BV, q_BV = log_m_BV.exp(), log_q_BV.exp()
        m_B, q_B = (probs_BV.gather(1, drafts_B[:, None]).squeeze(1) for probs_BV in (m_BV, q_BV))
        accepted_B = torch.rand_like(m_B) * q_B < m_B
        residual_BV = (m_BV - q_BV).clamp(min=0)
        # q = m but for rounding: a draft is then rejected with a probability of rounding errors
        is_zero_B1 = residual_BV.sum(-1, keepdim=True) == 0
        corrected_B = torch.multinomial(torch.where(is_zero_B1, m_BV, residual_BV), num_samples=1).squeeze(1)
        return accepted_B, torch.where(accepted_B, drafts_B, corrected_B)

    def _log_probs(self, logits_BV: Tensor, tokens_BL: Tensor, length_B: Tensor) -> Tensor:
        processed_BV = process_logits(self._processor, logits_BV, tokens_BL, length_B)
        # of a greedy choice only the order counts
        return processed_BV if self._is_greedy else torch.log_softmax(processed_BV, dim=-1)

    def _choose(self, log_probs_BV: Tensor) -> Tensor:
        if self._is_greedy:
            return log_probs_BV.argmax(-1)
        return torch.multinomial(log_probs_BV.exp(), num_samples=1).squeeze(1)


def make_finite(logits_BV: Tensor) -> Tensor:
    """The logits, or zeros in a row that has no distribution."""
    top_B1 = logits_BV.amax(-1, keepdim=True)
    return torch.where(top_B1.isfinite(), logits_BV, torch.zeros_like(logits_BV))
