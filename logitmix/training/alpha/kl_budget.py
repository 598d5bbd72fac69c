"""The alpha that keeps the mixture within a KL budget of the anchor, on the rollouts of the last outer step.

Shape legend: B sequences, T completion tokens, K tokens of all sequences, V vocabulary.
"""

import torch
from torch import Tensor
from trl import GRPOTrainer

from logitmix.mixture.padding import position_ids_from_mask
from logitmix.mixture.realignment import alpha_for_kl, kl_to_anchor
from logitmix.training.batch import Batch, own_tokens

SEQUENCES, TOKENS = 4, 128  # of a process: their logits of the whole vocabulary are held, once for each member
HIGHEST = 0.95  # the policy has no gradient at alpha 1


def alpha_within_budget(trainer: GRPOTrainer, batch: Batch, budget: float) -> float:
    """The smallest alpha at which KL(mixture ‖ anchor), in nats a token, is within the budget, and at most 0.95.

    The KL is the mean over the first tokens of the first rollouts of the batch, of all processes, at the sampling
    temperature: that of `mixture/kl_anchor`. Members run once, and alpha is found by bisection. Rollouts without any
    token that counts, as where all are cut and masked, leave alpha as it is.
    """
    policy_KV, anchor_KV = member_log_probs(trainer, batch)

    def total(values_K: Tensor) -> float:
        return float(trainer.accelerator.gather(values_K.sum()[None]).sum())

    count = total(torch.ones(len(policy_KV), device=policy_KV.device))
    if count == 0:
        return float(trainer.model.alpha)

    def kl(alpha: float) -> float:
        return total(kl_to_anchor(policy_KV, anchor_KV, alpha)) / count

    return min(alpha_for_kl(kl, budget), HIGHEST)


@torch.no_grad()
def member_log_probs(trainer: GRPOTrainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and anchor, `[K, V]` each, at the tokens that the mixture wrote."""
    model, T = trainer.model, min(TOKENS, batch["completion_ids"].shape[1])
    ids, mask = (
        torch.cat([batch[f"prompt_{key}"], batch[f"completion_{key}"][:, :T]], dim=1)[:SEQUENCES]
        for key in ("ids", "mask")
    )
    written_BT = own_tokens(batch)[:SEQUENCES, :T].bool()
    was_training = model.training
    model.eval()
    members = []
    with trainer.accelerator.autocast():
        for alpha in (0.0, 1.0):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=position_ids_from_mask(mask), use_cache=False,
                alpha=alpha, logits_to_keep=T + 1,
            ).logits  # fmt: skip
            members.append((logits[:, :-1][written_BT].float() / trainer.temperature).log_softmax(-1))
    model.train(was_training)
    policy_KV, anchor_KV = members
    return policy_KV, anchor_KV
