"""Drafting and verifying one token a sequence: speculative sampling, greedy or sampled.

Shape legend: B sequences, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p")
_DEFAULT_TOP_K = 50  # of `generate`, when it samples


class SpeculativeSampler:
    """Drafts tokens and verifies them under the settings of `generate`.

    Args:
        settings: `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, with the defaults of `generate`.
        generator: the random numbers; torch's default generator of the device if None.

    Raises `ValueError` for a setting that it does not know.
    """

    def __init__(self, settings: dict[str, Any], generator: torch.Generator | None = None) -> None:
        unknown = sorted(name for name in set(settings) - set(_SETTINGS) if settings[name] is not None)
        if unknown:
            raise ValueError(
                f"alternating decoding does not know the setting {unknown[0]!r}; it takes {', '.join(_SETTINGS)}; "
                "leave the setting out, or use joint decoding"
            )
        self._is_greedy = not settings.get("do_sample")
        self._warpers = LogitsProcessorList() if self._is_greedy else _warpers(settings)
        self._generator = generator

    def draft(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` from a member's own logits, and the log-probabilities `log q`, `[B, V]`, that drew them.

        A row without a distribution (NaN, +inf, or -inf everywhere) drafts uniformly: any q is exact, and the mixture
        may ignore this member.
        """
        top_B1 = logits_BV.amax(-1, keepdim=True)
        logits_BV = torch.where(top_B1.isfinite(), logits_BV, torch.zeros_like(logits_BV))
        log_q_BV = self._log_probs(logits_BV)
        return self._choose(log_q_BV), log_q_BV

    def verify(self, logits_BV: Tensor, drafts_B: Tensor, log_q_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the target of these logits accepts each draft, `[B]`, and the next tokens, `[B]`.

        With m the target's distribution: accepted with probability `min(1, m(d) / q(d))`, else drawn from the residual
        distribution `max(m - q, 0)`, normalised. The token is distributed as m. Greedy: the argmax of m.
        """
        log_m_BV = self._log_probs(logits_BV)
        if self._is_greedy:
            tokens_B = self._choose(log_m_BV)
            return tokens_B == drafts_B, tokens_B
        m_BV, q_BV = log_m_BV.exp(), log_q_BV.exp()
        m_B, q_B = (probs_BV.gather(1, drafts_B[:, None]).squeeze(1) for probs_BV in (m_BV, q_BV))
        accepted_B = torch.rand(m_B.shape, generator=self._generator, device=m_B.device) * q_B < m_B
        residual_BV = (m_BV - q_BV).clamp(min=0)
        # q = m but for rounding: a draft is then rejected with a probability of rounding errors
        is_zero_B1 = residual_BV.sum(-1, keepdim=True) == 0
        corrected_B = self._multinomial(torch.where(is_zero_B1, m_BV, residual_BV))
        return accepted_B, torch.where(accepted_B, drafts_B, corrected_B)

    def _log_probs(self, logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        if self._is_greedy:
            return logits_BV  # only their order counts
        # The warpers of a single token read no earlier ones
        return torch.log_softmax(self._warpers(torch.empty(0, dtype=torch.long), logits_BV), dim=-1)

    def _choose(self, log_probs_BV: Tensor) -> Tensor:
        return log_probs_BV.argmax(-1) if self._is_greedy else self._multinomial(log_probs_BV.exp())

    def _multinomial(self, probs_BV: Tensor) -> Tensor:
        return torch.multinomial(probs_BV, num_samples=1, generator=self._generator).squeeze(1)


def _warpers(settings: dict[str, Any]) -> LogitsProcessorList:
    """The warpers of `generate`, in its order."""
    temperature, top_k, top_p, min_p = (settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    top_k = _DEFAULT_TOP_K if top_k is None else top_k
    warpers = LogitsProcessorList()
    if temperature is not None and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k != 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers
