"""Scores of tokens under the mixture, through the fused loss head or from the members' logits.

Shape legend: B sequences, T tokens, N scored tokens of all sequences, one sequence after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from logitmix.loss_head import Coefficients, clipped_coefficients
from logitmix.loss_head.libraries import restore_choices
from logitmix.loss_head.scorer import AnchorStates, FusedScorer
from logitmix.mixture.configuration import resolve_weights
from logitmix.mixture.decoding.support import SequenceSupport
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.scoring import score_and_diagnose_labels, score_labels
from logitmix.training.batch import Batch, own_tokens, scored_inputs
from logitmix.training.checkpointing.resume import State
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.trl_patches import PatchedGRPOTrainer, install_scoring_forward

# Losses that are sums over tokens of eq. 6's clipped term, each token with a weight known before the loss
_TOKEN_LOSSES = ("dapo", "bnpo", "dr_grpo", "grpo")


@dataclass(frozen=True)
class KeptStates:
    """The anchors' states that a scoring returned. accelerate, which casts the tensors in a forward's output to
    float32, does not look inside this object.
    """

    by_sequence: AnchorStates


@dataclass
class MixtureScores(FusedCausalLMOutput):
    """TRL's output of a scoring forward, with the mixture's diagnostics and the anchors' states where asked for."""

    diagnostics: MixtureDiagnostics | None = None
    anchor_states: KeptStates | None = None


class MixtureScorer:
    """Scores labels under a mixture, as a forward of the model: `model(…, labels=labels, fused_lm_head=True)`."""

    def __init__(self, model: LogitMixForCausalLM, args: LogitMixGRPOConfig) -> None:
        self.model, self.args = model, args
        self._fused = FusedScorer(model) if args.loss_head == "fused" else None
        install_scoring_forward(model, self.score)

    @property
    def keeps_anchor_states(self) -> bool:
        """Whether updates reuse the anchors' states. A refill exchanges rows after scoring, and states with them."""
        args = self.args
        reuses = args.anchor_states != "recompute" and args.train_target == "mixture"
        return self._fused is not None and reuses and args.dynamic_sampling != "refill"

    def states(self) -> dict[str, State]:
        """What a checkpoint holds of the scoring: the matrix libraries, which round differently.

        Each process saves its own. They need not agree: each computes the gradient of its own tokens.
        """
        if self._fused is None:
            return {}
        return {"matrix_libraries": State(self._fused.read_libraries, restore_choices)}

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        weights: Any = None,
        coefficients: Coefficients | None = None,
        diagnose: bool = False,
        anchor_states: AnchorStates | None = None,
        keep_anchor_states: bool = False,
        compute_aux_loss: bool = False,
        supports: Sequence[SequenceSupport] | None = None,
    ) -> MixtureScores:
        """Log-probabilities and entropies of the labels other than -100, `[B, T - 1]`; see `FusedScorer`."""
        if self._fused is not None:
            scores = self._fused(
                input_ids,
                attention_mask,
                labels,
                self.args.temperature,
                weights,
                coefficients,
                diagnose,
                anchor_states,
                keep_anchor_states=keep_anchor_states,
                compute_aux_loss=compute_aux_loss,
                supports=supports,
            )
            kept = None if scores.anchor_states is None else KeptStates(self._stored(scores.anchor_states))
            return MixtureScores(
                log_probs=scores.log_probs,
                entropy=scores.entropy,
                diagnostics=scores.diagnostics,
                anchor_states=kept,
                aux_loss=scores.aux_loss,
            )
        config = self.model.config
        resolved = resolve_weights(None, weights, len(config.members), config.scheme, config.weights)
        arguments = (self.model, input_ids, attention_mask, labels, resolved, self.args.temperature)
        aux_losses: list[Tensor] | None = [] if compute_aux_loss else None
        diagnostics = None
        if diagnose:
            log_probs, entropy, diagnostics = score_and_diagnose_labels(*arguments, aux_losses, supports)
        else:
            log_probs, entropy = score_labels(*arguments, aux_losses=aux_losses, supports=supports)
        return MixtureScores(
            log_probs=log_probs,
            entropy=entropy,
            diagnostics=diagnostics,
            aux_loss=aux_losses[0] if aux_losses else None,
        )

    @torch.no_grad()
    def anchor_states(self, batch: Batch, accelerator: Accelerator) -> AnchorStates:
        """The anchors' states at the tokens of a batch that nothing has scored, a micro-batch at a time."""
        assert self._fused is not None
        states: AnchorStates = []
        inputs, rows = scored_inputs(batch), self.args.per_device_train_batch_size
        with accelerator.autocast():
            for start in range(0, len(inputs[0]), rows):
                part = (tensor[start : start + rows] for tensor in inputs)
                states += self._stored(self._fused.anchor_states(*part))
        return states

    def _stored(self, states: AnchorStates) -> AnchorStates:
        if self.args.anchor_states != "offload":
            return states
        return [{name: hidden.to("cpu") for name, hidden in of_sequence.items()} for of_sequence in states]


def on_supports(model: Callable[..., Any], supports: Sequence[SequenceSupport]) -> Callable[..., Any]:
    """`model`, called with one part of a batch after another, scoring each on its part of the `supports`."""
    remaining = iter(supports)

    def score(input_ids: Tensor, **inputs: Any) -> Any:
        return model(input_ids=input_ids, supports=list(islice(remaining, len(input_ids))), **inputs)

    return score


def loss_coefficients(
    trainer: PatchedGRPOTrainer, batch: Batch, scored_BT: Tensor, loss_type: str
) -> Coefficients | None:
    """The derivative of TRL's loss by each scored token's log-probability, up to a common factor.

    None where it depends on more than that token (a sequence's ratio, the batch's entropies) or is not derived here;
    the fused loss head then computes its gradient in the backward pass. The last columns of `scored_BT` are the
    completions' tokens.
    """
    args = trainer.args
    depends_on_token_alone = (
        loss_type in _TOKEN_LOSSES
        and trainer.importance_sampling_level == "token"
        and trainer.top_entropy_quantile == 1
        and trainer.off_policy_mask_threshold is None
        and args.delta is None
        and not trainer.has_entropy_bonus
        and "importance_sampling_ratio" not in batch
    )
    if not depends_on_token_alone:
        return None
    mask_BT = own_tokens(batch)
    scored_BT = scored_BT[:, -mask_BT.shape[1] :]
    weight_BT = mask_BT.float()
    if loss_type == "grpo":
        weight_BT = weight_BT / weight_BT.sum(-1, keepdim=True).clamp(min=1)
    advantages = batch["advantages"]
    advantages_BT = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(mask_BT)
    weight_N, advantages_N = weight_BT[scored_BT], advantages_BT[scored_BT]
    old_BT, anchor_BT = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
    old_N = None if old_BT is None else old_BT[scored_BT]
    anchor_N = None if anchor_BT is None or trainer.beta == 0 else anchor_BT[scored_BT]

    def coefficients(log_probs: Tensor, tokens: slice) -> Tensor:
        old = None if old_N is None else old_N[tokens]
        derivative = clipped_coefficients(
            log_probs, advantages_N[tokens], old, trainer.epsilon_low, trainer.epsilon_high
        )
        if anchor_N is not None:  # TRL estimates the KL by exp(gap) - gap - 1, times the ratio with the correction
            gap = anchor_N[tokens] - log_probs
            if args.use_bias_correction_kl:
                ratio = 1 if old is None else torch.exp(log_probs - old)
                derivative = derivative - trainer.beta * ratio * gap
            else:
                derivative = derivative + trainer.beta * (1 - gap.exp())
        return derivative * weight_N[tokens]

    return coefficients
