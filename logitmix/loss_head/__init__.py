"""The fused loss head: the mixture's log-probs and their gradient, without ever holding the logits of all tokens."""

from logitmix.loss_head.chunking import Coefficients
from logitmix.loss_head.log_probs import clipped_coefficients, fused_log_probs

__all__ = ["Coefficients", "clipped_coefficients", "fused_log_probs"]
