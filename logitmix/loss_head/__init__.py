"""The fused loss head: the mixture's log-probs and their gradient without the logits of all tokens in memory."""

from logitmix.loss_head.coefficients import Coefficients, clipped_coefficients
from logitmix.loss_head.log_probs import fused_log_probs

__all__ = ["Coefficients", "clipped_coefficients", "fused_log_probs"]
