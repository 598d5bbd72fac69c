"""Whose log-probabilities the loss has: the mixture's, or the policy's alone on the mixture's rollouts.

With `train_target="policy"` the ratio of eq. 6 is an importance weight of each token,

    ρ = policy(y | x) / mixture_old(y | x)

so that for one token the mean of ρ · A · ∇ log policy over the mixture is the gradient of the policy's own expected
advantage, before the clip. Weights of single tokens leave the prefixes as the mixture distributes them.
"""

import torch

from logitmix.training.batch import Batch, scored_inputs
from logitmix.training.trl_patches import PatchedGRPOTrainer


def target_weights(trainer: PatchedGRPOTrainer) -> list[float] | None:
    """The members' weights in the loss: None for the mixture's own, or those of the policy alone."""
    if trainer.args.train_target == "mixture":
        return None
    return [1.0] + [0.0] * (len(trainer.model.config.members) - 1)


def add_sampling_log_probs(trainer: PatchedGRPOTrainer, batch: Batch) -> None:
    """Add the log-probabilities of the mixture that sampled, where the policy alone is trained.

    They are the denominator of its importance weights. TRL leaves them out where the first update uses all rollouts,
    since the ratio of a model to itself is 1 there.
    """
    if trainer.args.train_target == "mixture" or "old_per_token_logps" in batch:
        return
    ids, mask, _ = scored_inputs(batch)
    with torch.no_grad():
        batch["old_per_token_logps"], _, _ = trainer.score_tokens(
            trainer.model,
            ids,
            mask,
            batch["completion_ids"].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )
