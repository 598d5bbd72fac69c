"""The load-balancing loss of a mixture-of-experts policy."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from logitmix.mixture.head import gathered_parameters, run_decoder

WITH_ROUTER_LOGITS = {"output_router_logits": True}
"""Arguments with which a policy's forward also returns its router logits."""


def load_balancing_loss(config: PreTrainedConfig, output: Any, attention_mask: Tensor) -> Tensor:
    """Switch Transformers' auxiliary loss, `experts * sum_e f_e P_e` (arXiv 2101.03961, eq. 4), as TRL computes it.

    `f_e` is the fraction of the choices of the tokens that fall on expert e, and `P_e` its mean probability.

    Args:
        config: the policy's configuration.
        output: what its forward returned, with `router_logits` of each layer.
        attention_mask: `[B, T]`; padding does not count.
    """
    num_experts, top_k = output.router_logits[0].shape[-1], config.get_text_config(decoder=True).num_experts_per_tok
    loss: Tensor = load_balancing_loss_func(output.router_logits, num_experts, top_k, attention_mask)
    return loss


@torch.no_grad()
def has_load_balancing_loss(policy: PreTrainedModel) -> bool:
    """Whether the policy returns router logits. Some configurations of dense models have the options of experts.

    Raises `ValueError` for router logits of which no loss can be computed.
    """
    ids = torch.tensor([[1, 2]], device=policy.device)
    with gathered_parameters(policy):
        output = run_decoder(policy, input_ids=ids, **WITH_ROUTER_LOGITS)
    if not getattr(output, "router_logits", None):
        return False
    try:
        load_balancing_loss(policy.config, output, torch.ones_like(ids))
    except (AttributeError, RuntimeError, LookupError, TypeError) as error:
        raise ValueError(
            f"the load-balancing loss of the policy, a {type(policy).__name__}, cannot be computed ({error}); set "
            "router_aux_loss_coef=0 to train without it"
        ) from error
    return True
