"""Scoring tokens under a mixture through the fused loss head.

Shape legend: K members, B batch, T time, N scored tokens, V vocabulary, D hidden width of a member.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logitmix.loss_head import Coefficients, fused_log_probs
from logitmix.loss_head.chunking import active_members
from logitmix.loss_head.libraries import Library, ShapeClass, choose_libraries, read_choices
from logitmix.mixture.configuration import resolve_weights
from logitmix.mixture.decoding.support import SequenceSupport, Support
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.head import (
    REFERENCE,
    Head,
    HeadTransform,
    infer_head_transform,
    read_head,
    run_decoder,
    run_inside_heads,
)
from logitmix.mixture.member_prompts import (
    MemberPrompts,
    PassInputs,
    Prompts,
    validate_prompts_end_together,
)
from logitmix.mixture.mixing import Weights
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.padding import position_ids_from_mask
from logitmix.mixture.router import WITH_ROUTER_LOGITS, load_balancing_loss

AnchorStates = list[dict[str, Tensor]]
"""For each sequence, the last hidden states `[tokens, D]` at its scored tokens of each anchor that ran."""


class Scores(NamedTuple):
    """Entry t, of `[B, T - 1]`, scores the token at t + 1; it is 0 for tokens that are not scored."""

    log_probs: Tensor
    entropy: Tensor
    diagnostics: MixtureDiagnostics | None
    anchor_states: AnchorStates | None
    aux_loss: Tensor | None = None


class FusedScorer:
    """Scores tokens under a mixture without its logits, from the members' last hidden states at those tokens.

    Raises `ValueError` for a member whose output head the fused loss head cannot read, and for a mixture with a
    plausibility cut.
    """

    def __init__(self, model: LogitMixForCausalLM) -> None:
        model.config.require_one_prompt("the fused loss head")
        if model.config.cut is not None:
            raise ValueError(
                f"the mixture has plausibility {model.config.plausibility}, which the fused loss head does not apply; "
                f"{REFERENCE}, or config.set_plausibility(None)"
            )
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
        compute_aux_loss: bool = False,
        supports: Sequence[SequenceSupport] | None = None,
        member_prompts: Mapping[str, Prompts] | None = None,
    ) -> Scores:
        """Scores of the labels other than -100, equal to those of `LogitMixForCausalLM.score` up to rounding.

        Args:
            coefficients: derivative of the loss by the log-probs of all sequences in a row; see `fused_log_probs`.
            diagnose: also compare the mixture with its members. Requires non-zero weights.
            anchor_states: the states that an earlier call returned for these tokens and labels; the anchors do not
                run again.
            keep_anchor_states: return the anchors' states.
            compute_aux_loss: return the load-balancing loss of the policy, a mixture of experts.
            supports: of the completions that the labels are; probabilities are then those among the kept tokens.
            member_prompts: what members read, as in `score`.
        """
        config = self.model.config
        resolved = resolve_weights(None, weights, len(config.members), config.scheme, config.weights)
        active = active_members(resolved)
        names = [config.members[k] for k in active]
        targets_BT = labels[:, 1:]
        scored_BT = targets_BT != -100
        aux_losses: list[Tensor] | None = [] if compute_aux_loss else None
        prompts = None
        if member_prompts is not None:
            prompts = MemberPrompts.of(member_prompts, config, input_ids, self.model.tokenizer)
        hidden = [
            torch.cat([states[name] for states in anchor_states]).to(labels.device, non_blocking=True)
            if name != "policy" and anchor_states is not None
            else self.hidden_states(name, input_ids, attention_mask, scored_BT, aux_losses, prompts)
            for name in names
        ]
        weights_K = resolved[..., active]
        if weights_K.dim() == 2:  # from one row a sequence to one row a token
            weights_K = weights_K.repeat_interleave(scored_BT.sum(1).cpu(), dim=0)
        chunks: list[MixtureDiagnostics] = []
        support = None if supports is None else Support.of_scored(supports, scored_BT)

        def score(hidden: list[Tensor]) -> tuple[Tensor, Tensor]:
            return fused_log_probs(
                hidden,
                [self.head(name) for name in names],
                weights_K,
                targets_BT[scored_BT],
                config.scheme,
                temperature,
                config.vocab_size,
                coefficients,
                diagnostics=chunks if diagnose else None,
                share_products=False,  # rounds as with diagnostics, so that the ratio before an update is 1
                support=support,
                check=False,  # the trainer checks the loss, without another synchronisation
            )

        heads = [getattr(self.model, config.model_of(name)).get_output_embeddings() for name in names]
        log_probs_N, entropy_N = run_inside_heads(heads, hidden, score)
        kept = None
        if keep_anchor_states:
            anchors = {name: h for name, h in zip(names, hidden, strict=True) if name != "policy"}
            kept = _split_by_sequence(anchors, scored_BT)
        return Scores(
            _scatter(log_probs_N, scored_BT),
            _scatter(entropy_N, scored_BT),
            _join_diagnostics(chunks, scored_BT) if chunks else None,
            kept,
            aux_losses[0] if aux_losses else None,
        )

    def anchor_states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> AnchorStates:
        """The states that a call with `keep_anchor_states` returns, without scoring anything."""
        config, scored_BT = self.model.config, labels[:, 1:] != -100
        active = [n for n, w in zip(config.members[1:], config.weights[1:], strict=True) if w != 0]
        hidden = {name: self.hidden_states(name, input_ids, attention_mask, scored_BT) for name in active}
        return _split_by_sequence(hidden, scored_BT)

    def head(self, name: str) -> Head:
        """The head of the member `name`, with its present parameters."""
        model_name = self.model.config.model_of(name)
        return read_head(getattr(self.model, model_name), self._head_transforms[model_name])

    def read_libraries(self) -> dict[ShapeClass, Library]:
        """The library of each class of matrix products, for a checkpoint; see `libraries.restore_choices`.

        Those of members that have not run yet, because their weight was 0 so far, are chosen now: a run that resumes
        from the checkpoint would otherwise choose on its own.
        """
        for name in self.model.config.model_names:
            head = getattr(self.model, name).get_output_embeddings()
            if head.weight.device.type == "cpu":
                width = getattr(head, "in_features", head.weight.shape[-1])  # ZeRO-3 partitions the weight
                choose_libraries(self.model.config.vocab_size, width)
        return read_choices()

    def hidden_states(
        self,
        name: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_BT: Tensor,
        aux_losses: list[Tensor] | None = None,
        prompts: MemberPrompts | None = None,
    ) -> Tensor:
        """The last hidden states `[N, D]` of the member `name` at the tokens that predict a scored one.

        The policy's load-balancing loss is appended to `aux_losses`, if given.
        """
        needs_grad = torch.is_grad_enabled() and name == "policy"
        needs_aux_loss = aux_losses is not None and name == "policy"
        position_ids = position_ids_from_mask(attention_mask)
        read = PassInputs(input_ids, attention_mask, position_ids)
        if prompts is not None:
            validate_prompts_end_together(scored_BT, attention_mask)
            shared = scored_BT.shape[1] - int(scored_BT.any(0).int().argmax())
            inputs, _ = prompts.inputs([name], input_ids, attention_mask, position_ids, {name: 0}, shared + 1)
            read, scored_BT = inputs[name], scored_BT[:, -shared:]
        with self.model.as_member(name) as member, torch.set_grad_enabled(needs_grad):
            output = run_decoder(
                member,
                **vars(read),
                **(WITH_ROUTER_LOGITS if needs_aux_loss else {}),
            )
            if aux_losses is not None and needs_aux_loss and read.attention_mask is not None:
                aux_losses.append(load_balancing_loss(member.config, output, read.attention_mask))
        hidden_ND = output.last_hidden_state[:, -1 - scored_BT.shape[1] : -1][scored_BT]
        device = hidden_ND.device.type
        if name != "policy" and torch.is_autocast_enabled(device):
            # the dtype in which a head would take them, kept or not: otherwise kept states would move the ratio off 1
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        return hidden_ND


def _scatter(scores_N: Tensor, scored_BT: Tensor) -> Tensor:
    """`[N, ...]` at the scored tokens of `[B, T - 1, ...]`, 0 elsewhere."""
    rest = scores_N.shape[1:]
    mask = scored_BT.view(*scored_BT.shape, *(1 for _ in rest)).expand(*scored_BT.shape, *rest)
    return scores_N.new_zeros(mask.shape).masked_scatter(mask, scores_N)


def _join_diagnostics(chunks: Sequence[MixtureDiagnostics], scored_BT: Tensor) -> MixtureDiagnostics:
    """Those of `[B, T - 1]` tokens, from those of chunks of the scored ones."""
    return MixtureDiagnostics(*(_scatter(torch.cat(parts), scored_BT) for parts in zip(*chunks, strict=True)))


def _split_by_sequence(hidden: dict[str, Tensor], scored_BT: Tensor) -> AnchorStates:
    lengths = scored_BT.sum(1).tolist()
    parts = {name: torch.split(hidden_ND, lengths) for name, hidden_ND in hidden.items()}
    return [{name: states[i] for name, states in parts.items()} for i in range(len(lengths))]
