"""How the trainer's scoring of tokens is answered by the mixture, through the fused loss head or the members' logits.

Shape legend: B sequences, T tokens, N scored tokens of all sequences, one sequence after another.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from logitmix.loss_head import Coefficients, clipped_coefficients
from logitmix.loss_head.scorer import AnchorStates, FusedScorer
from logitmix.mixture.modeling import LogitMixForCausalLM

# Losses that are sums over tokens of eq. 6's clipped term, each token with a weight that is known beforehand
_TOKEN_LOSSES = ("dapo", "bnpo", "dr_grpo", "grpo")


class MixtureScoring:
    """Gives the model's forward TRL's scoring protocol, answered by the mixture.

    TRL asks for log-probabilities with `model(..., labels=labels, fused_lm_head=True)`, a forward that it has put on
    the model itself and that reads `base_model` and `get_output_embeddings()`. This takes that forward's place. It
    stays a call of the model, so that wrappers (DDP, FSDP) see it, and heads are whole in it where they are sharded.
    The loss, which has gradients, leaves the mixture's diagnostics with the trainer.
    """

    def __init__(self, model: LogitMixForCausalLM, trainer: GRPOTrainer) -> None:
        self.model, self.trainer, self.args = model, trainer, trainer.args
        self._fused = FusedScorer(model) if self.args.loss_head == "fused" else None
        self._inputs: dict[str, Any] | None = None  # of the loss under way
        self._collected: AnchorStates | None = None  # in the generation step under way

        def forward(self_: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return type(self_).forward(self_, *args, labels=labels, **kwargs)
            return self._score(kwargs["input_ids"], kwargs["attention_mask"], labels, kwargs.get("weights"))

        # `generate` checks its arguments against this signature
        forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
        model.forward = types.MethodType(forward, model)

    @contextmanager
    def loss_of(self, inputs: dict[str, Any]) -> Iterator[None]:
        """In this context the scores with gradients are those of the loss of `inputs`."""
        self._inputs = inputs
        try:
            yield
        finally:
            self._inputs = None

    def sampled(self, sample: Callable[[Any], dict[str, Any]], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """`sample(inputs)`; the anchors' states that its scoring comes by, if any, are its `anchor_states`."""
        self._collected = []
        try:
            output = sample(inputs)
        finally:
            collected, self._collected = self._collected, None
        return output | ({"anchor_states": collected} if collected else {})

    def _score(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, weights: Any) -> FusedCausalLMOutput:
        trainer, is_loss = self.trainer, torch.is_grad_enabled()
        inputs = (input_ids, attention_mask, labels, trainer.temperature)
        diagnose = is_loss and all(self.model.config.weights)
        if self._fused is None:
            if diagnose:
                log_probs, entropy, trainer.diagnostics = self.model.score_and_diagnose(*inputs)
            else:
                log_probs, entropy = self.model.score(*inputs, weights=weights)
            return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)
        batch = self._inputs if is_loss else None
        # Where rows are exchanged after scoring ("refill"), what was kept of them would no longer be theirs
        keeps = self.args.anchor_states != "recompute" and self.args.dynamic_sampling != "refill"
        keeps = keeps and self._collected is not None and weights is None and self.model.training
        scores = self._fused(
            *inputs,
            weights=weights,
            coefficients=None if batch is None else loss_coefficients(trainer, batch, labels[:, 1:] != -100),
            diagnose=diagnose,
            anchor_states=None if batch is None else batch.get("anchor_states"),
            keep_anchor_states=keeps,
        )
        if scores.anchor_states is not None and self._collected is not None:
            self._collected += self._stored(scores.anchor_states)
        if diagnose:
            trainer.diagnostics = scores.diagnostics
        return FusedCausalLMOutput(log_probs=scores.log_probs, entropy=scores.entropy)

    def _stored(self, states: AnchorStates) -> AnchorStates:
        if self.args.anchor_states != "offload":
            return states
        return [{name: hidden.to("cpu") for name, hidden in of_sequence.items()} for of_sequence in states]


def loss_coefficients(trainer: GRPOTrainer, inputs: dict[str, Any], scored_BT: Tensor) -> Coefficients | None:
    """The derivative of TRL's loss by each scored token's log-prob, up to a common factor; None where it depends on
    more than that token (a sequence's ratio, the batch's entropies), or is not worked out here.

    `scored_BT` are the tokens scored, of which the last columns are the completions'.
    """
    args = trainer.args
    of_tokens_alone = (
        trainer.loss_type in _TOKEN_LOSSES
        and trainer.importance_sampling_level == "token"
        and trainer.top_entropy_quantile == 1
        and trainer.off_policy_mask_threshold is None
        and args.delta is None
        and not trainer._entropy_bonus_enabled
        and "importance_sampling_ratio" not in inputs
    )
    if not of_tokens_alone:
        return None
    mask_BT = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    scored_BT = scored_BT[:, -mask_BT.shape[1] :]
    weight_BT = mask_BT.float()
    if trainer.loss_type == "grpo":
        weight_BT = weight_BT / weight_BT.sum(-1, keepdim=True).clamp(min=1)
    advantages = inputs["advantages"]
    advantages_BT = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(mask_BT)
    weight_N, advantages_N = weight_BT[scored_BT], advantages_BT[scored_BT]
    old_BT, anchor_BT = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
    old_N = None if old_BT is None else old_BT[scored_BT]
    anchor_N = None if anchor_BT is None or trainer.beta == 0 else anchor_BT[scored_BT]

    def coefficients(log_probs: Tensor, tokens: slice) -> Tensor:
        old = None if old_N is None else old_N[tokens]
        of_loss = clipped_coefficients(log_probs, advantages_N[tokens], old, trainer.epsilon_low, trainer.epsilon_high)
        if anchor_N is not None:  # of TRL's estimate of the KL, exp(gap) - gap - 1, here times the ratio or not
            gap = anchor_N[tokens] - log_probs
            if args.use_bias_correction_kl:
                ratio = 1 if old is None else torch.exp(log_probs - old)
                of_loss = of_loss - trainer.beta * ratio * gap
            else:
                of_loss = of_loss + trainer.beta * (1 - gap.exp())
        return of_loss * weight_N[tokens]

    return coefficients
