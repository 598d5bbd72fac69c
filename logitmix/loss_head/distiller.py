"""The divergence of a student from a mixture at the tokens of a batch, through the fused distillation loss.

Shape legend: K members, B batch, T time, N scored tokens, V vocabulary, D hidden width.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitmix.loss_head.distillation import fused_divergence
from logitmix.loss_head.divergence import token_divergence
from logitmix.loss_head.libraries import Library, ShapeClass
from logitmix.loss_head.scorer import FusedScorer
from logitmix.mixture.head import infer_head_transform, read_head, run_decoder, run_inside_heads
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.padding import position_ids_from_mask


class FusedDistiller:
    """Divergences without the logits of all tokens, from the last hidden states of the student and the members.

    Raises `ValueError` for a student or a member whose output head the fused loss cannot read.
    """

    def __init__(self, student: PreTrainedModel, teacher: LogitMixForCausalLM) -> None:
        self.teacher, self._members = teacher, FusedScorer(teacher)
        self._transform = infer_head_transform(student, "the student")

    def __call__(
        self,
        student: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_BT: Tensor,
        beta: float = 1.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Divergences and the student's entropies `[N]` where the next token is scored; see `fused_divergence`.

        `scored_BT`, `[B, T - 1]`, says of the token at t + 1 whether its distribution is compared.
        """
        config = self.teacher.config
        names = [n for n, w in zip(config.members, config.weights, strict=True) if w != 0] or config.members[:1]
        weights = [w for w in config.weights if w != 0] or [0.0]  # all 0: the uniform distribution
        with torch.no_grad():
            hidden = [self._members.hidden_states(name, input_ids, attention_mask, scored_BT) for name in names]
        output = run_decoder(
            student,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids_from_mask(attention_mask),
        )

        def compare(states: list[Tensor]) -> tuple[Tensor, Tensor]:
            head, heads = read_head(student, self._transform), [self._members.head(name) for name in names]
            return fused_divergence(
                states[0], head, hidden, heads, weights, config.scheme, beta, temperature, config.vocab_size
            )

        student_ND = output.last_hidden_state[:, :-1][scored_BT]
        divergence_N, entropy_N = run_inside_heads([student.get_output_embeddings()], [student_ND], compare)
        return divergence_N, entropy_N

    def read_libraries(self) -> dict[ShapeClass, Library]:
        """The library of each class of matrix products, for a checkpoint; see `FusedScorer.read_libraries`."""
        return self._members.read_libraries()


class ReferenceDistiller:
    """As `FusedDistiller`, from whole logits: for models whose head it cannot read, and the reference in its tests."""

    def __init__(self, teacher: LogitMixForCausalLM) -> None:
        self.teacher = teacher

    def __call__(
        self,
        student: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_BT: Tensor,
        beta: float = 1.0,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids_from_mask(attention_mask),
        }
        V = self.teacher.config.vocab_size
        with torch.no_grad():
            teacher_NV = self.teacher(**inputs, use_cache=False).logits[:, :-1][scored_BT].float()
        student_NV = student(**inputs, use_cache=False).logits[:, :-1, :V][scored_BT].float()
        divergence_N, entropy_N = token_divergence(student_NV, teacher_NV, beta, temperature)
        return divergence_N, entropy_N.detach()
