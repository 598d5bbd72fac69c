"""Scoring tokens under a mixture through the fused loss head.

Shape legend: K members, B batch, T time, N scored tokens, V vocabulary, D width of a member's hidden states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitmix.loss_head import Coefficients, fused_log_probs
from logitmix.mixture.configuration import resolve_weights
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import HeadTransform, infer_head_transform, last_hidden_states, read_head, run_inside_heads
from logitmix.mixture.mixing import Weights
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.padding import position_ids_from_mask

AnchorStates = list[dict[str, Tensor]]
"""For each sequence the last hidden states of its scored tokens, `[tokens, D]` of each anchor that was run."""


class Scores(NamedTuple):
    """Entry t is about the token at t + 1, `[B, T - 1]`, and 0 where that is not scored."""

    log_probs: Tensor
    entropy: Tensor
    diagnostics: MixtureDiagnostics | None
    anchor_states: AnchorStates | None


class FusedScorer:
    """Scores tokens under a mixture without its logits: members run up to their last hidden states, at scored tokens.

    Raises `ValueError` for a member whose output head the fused loss head does not know.
    """

    def __init__(self, model: LogitMixForCausalLM) -> None:
        self.model = model
        self._head_transforms: dict[str, HeadTransform] = {
            name: infer_head_transform(getattr(model, name), name) for name in model.config.model_names
        }

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        weights: Weights | None = None,
        coefficients: Coefficients | None = None,
        diagnose: bool = False,
        anchor_states: AnchorStates | None = None,
        keep_anchor_states: bool = False,
    ) -> Scores:
        """Scores of the labels other than -100, equal to those of [`LogitMixForCausalLM.score`] up to rounding.

        Args:
            coefficients: the loss's derivative by the log-probs, those of all sequences one after another; see
                [`fused_log_probs`].
            diagnose: compare the mixture to its members, whose weights must then differ from 0.
            anchor_states: those of an earlier call with these tokens and labels; the anchors are then not run.
            keep_anchor_states: return them.
        """
        config = self.model.config
        resolved = resolve_weights(None, weights, len(config.members), config.scheme, config.weights)
        used = (resolved.view(-1, resolved.shape[-1]) != 0).any(0).tolist()
        places = [k for k, is_used in enumerate(used) if is_used] or [0]
        names = [config.members[k] for k in places]
        targets_BT = labels[:, 1:]
        scored_BT = targets_BT != -100
        hidden = [
            torch.cat([states[name] for states in anchor_states]).to(labels.device, non_blocking=True)
            if name != "policy" and anchor_states is not None
            else self._hidden_states(name, input_ids, attention_mask, scored_BT)
            for name in names
        ]
        models = [config.model_of(name) for name in names]
        members = [getattr(self.model, model) for model in models]
        weights_K = resolved[..., places]
        if weights_K.dim() == 2:  # a row a sequence; the loss head takes a row a token
            weights_K = weights_K.repeat_interleave(scored_BT.sum(1).cpu(), dim=0)
        chunks: list[MixtureDiagnostics] = []

        def of_hidden(hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
            return fused_log_probs(
                hidden,
                [
                    read_head(member, self._head_transforms[model])
                    for member, model in zip(members, models, strict=True)
                ],
                weights_K,
                targets_BT[scored_BT],
                config.scheme,
                temperature,
                config.vocab_size,
                coefficients,
                diagnostics=chunks if diagnose else None,
                check=False,  # a guard of the trainer looks at the outcome
            )

        log_probs_N, entropy_N = run_inside_heads([m.get_output_embeddings() for m in members], hidden, of_hidden)
        kept = None
        if keep_anchor_states:
            kept = _by_sequence(
                {name: h for name, h in zip(names, hidden, strict=True) if name != "policy"}, scored_BT
            )
        found = None
        if chunks:
            found = MixtureDiagnostics(*(_placed(torch.cat(parts), scored_BT) for parts in zip(*chunks, strict=True)))
        return Scores(_placed(log_probs_N, scored_BT), _placed(entropy_N, scored_BT), found, kept)

    def _hidden_states(self, name: str, input_ids: Tensor, attention_mask: Tensor, scored_BT: Tensor) -> Tensor:
        """The last hidden states `[N, D]` of the member `name` where the next token is scored."""
        position_ids = position_ids_from_mask(attention_mask)
        with (
            self.model.as_member(name) as member,
            torch.set_grad_enabled(torch.is_grad_enabled() and name == "policy"),
        ):
            hidden_BTD = last_hidden_states(
                member, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
        return hidden_BTD[:, :-1][scored_BT]


def _placed(scores_N: Tensor, scored_BT: Tensor) -> Tensor:
    """`[N, ...]` put where it was scored, 0 elsewhere: `[B, T - 1, ...]`."""
    rest = scores_N.shape[1:]
    mask = scored_BT.view(*scored_BT.shape, *(1 for _ in rest)).expand(*scored_BT.shape, *rest)
    return scores_N.new_zeros(mask.shape).masked_scatter(mask, scores_N)


def _by_sequence(hidden: dict[str, Tensor], scored_BT: Tensor) -> AnchorStates:
    lengths = scored_BT.sum(1).tolist()
    device = scored_BT.device.type
    kept = {}
    for name, hidden_ND in hidden.items():
        if torch.is_autocast_enabled(device):  # as a head would take them
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        kept[name] = torch.split(hidden_ND, lengths)
    return [{name: parts[i] for name, parts in kept.items()} for i in range(len(lengths))]
