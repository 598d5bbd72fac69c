"""The load-balancing loss of a mixture-of-experts policy."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

WITH_ROUTER_LOGITS = {"output_router_logits": True}
"""Arguments with which a policy's forward also returns its router logits."""


def load_balancing_loss(config: PreTrainedConfig, output: Any, attention_mask: Tensor) -> Tensor:
    """Switch Transformers' auxiliary loss, `experts * sum_e f_e P_e` (arXiv 2101.03961, eq. 4), as TRL computes it.

    `f_e` is the fraction of the choices of the tokens that fall on expert e, and `P_e` its mean probability.

    Args:
        config: the policy's configuration.
        output: what its forward returned, with `router_logits` of each layer.
        attention_mask: `[B, T]`; padding does not count.

    Raises `ValueError` if the policy returned no router logits.
    """
    text = config.get_text_config(decoder=True)
    router_logits = getattr(output, "router_logits", None)
    if not router_logits:
        raise ValueError(
            f"router_aux_loss_coef is not 0, but the policy, a {text.model_type}, returns no router logits; set "
            "router_aux_loss_coef=0 to train without the load-balancing loss"
        )
    loss: Tensor = load_balancing_loss_func(router_logits, text.num_experts, text.num_experts_per_tok, attention_mask)
    return loss
