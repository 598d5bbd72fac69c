"""The fused loss head: the mixture's log-probs and their gradient, without ever holding the logits of all tokens."""

from logitmix.loss_head.fused import clipped_coefficients, fused_log_probs
from logitmix.loss_head.job import Coefficients

__all__ = ["Coefficients", "clipped_coefficients", "fused_log_probs"]
