"""The trust-region teacher of SDPO (arXiv 2605.20555, eq. 11): a mixture whose members read different contexts.

SDPO (Hübotter et al. 2026, arXiv 2601.20802) distils a policy that reads feedback f into the same policy that does
not. TRL's experimental `SDPOTrainer` does the rest; it reads its teacher from a public attribute.

Shape legend: B sequences, T completion tokens, V vocabulary.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from logitmix.mixture.mixing import mix_logits

ReferenceReads = Literal["prompt", "feedback"]


class TrustRegionTeacher(nn.Module):
    """The teacher of SDPO, without gradients:

        q*(y_t | x, f, y_<t) ∝ q_ref(y_t | c, y_<t)^(1 - a) · q_θ(y_t | x, f, y_<t)^a

    Of all q with KL(q ‖ q_ref) at most that of q*, it has the largest E_q[log q_θ - log q_ref]; 1/a is the Lagrange
    multiplier of the constraint (their proposition B.1). `a` is eq. 11's alpha, the weight of the policy, so that 1 is
    plain SDPO, for which the reference does not run; it is 1 - alpha of a mixture whose anchor is the reference.

    Args:
        policy: the model that trains, as it is at each call.
        reference: the frozen model; it is set to evaluation mode and requires no gradients.
        policy_weight: `a`, above 0 and at most 1.
        reference_reads: the reference's context c: `"prompt"` is x, without the feedback; `"feedback"` is x and f, as
            in eq. 11. With the second, `LogitMixForCausalLM.from_members(policy, reference, alpha=1 - a)` is the same
            teacher.
    """

    def __init__(
        self, policy: Any, reference: PreTrainedModel, policy_weight: float, reference_reads: ReferenceReads
    ) -> None:
        super().__init__()
        if not 0 < policy_weight <= 1:
            raise ValueError(
                f"policy_weight is {policy_weight}, but must be above 0 and at most 1, which is SDPO without a "
                "reference"
            )
        if reference_reads not in get_args(ReferenceReads):
            names = " or ".join(map(repr, get_args(ReferenceReads)))
            raise ValueError(f"reference_reads is {reference_reads!r}; it must be {names}")
        sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the policy has logits for {sizes[0]} tokens and the reference for {sizes[1]}")
        self.policy, self.reference = policy, reference.requires_grad_(False).eval()
        self.policy_weight, self.reference_reads = policy_weight, reference_reads
        self._prompts: tuple[Tensor, Tensor] | None = None

    def set_prompts(self, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        """The prompts x of the next calls, `[B, P]` with padding on the left: what the reference reads."""
        self._prompts = prompt_ids, prompt_mask

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, use_cache: bool = False
    ) -> CausalLMOutput:
        """Unnormalised log q* `[B, T + 1, V]` at the last `logits_to_keep` = T + 1 positions.

        `input_ids` are x, f and the completion of T tokens, which also follows x where the reference reads that.
        """
        settings = {"logits_to_keep": logits_to_keep, "use_cache": use_cache}
        policy = self.policy(input_ids=input_ids, attention_mask=attention_mask, **settings).logits
        if self.policy_weight == 1:
            return CausalLMOutput(logits=policy)
        if self.reference_reads == "prompt":
            if self._prompts is None:
                raise ValueError("the reference reads prompts without feedback; pass them to set_prompts first")
            T = logits_to_keep - 1
            ids, mask = self._prompts
            input_ids = torch.cat([ids, input_ids[:, -T:]], dim=1)
            attention_mask = torch.cat([mask, attention_mask[:, -T:]], dim=1)
        reference = self.reference(input_ids=input_ids, attention_mask=attention_mask, **settings).logits
        return CausalLMOutput(logits=mix_logits([policy, reference], [self.policy_weight, 1 - self.policy_weight]))


class TrustRegionSDPOTrainer(SDPOTrainer):
    """TRL's `SDPOTrainer` with the teacher of eq. 11; see `TrustRegionTeacher`.

    Takes the arguments of TRL's trainer, and `reference`, `policy_weight` and `reference_reads`. Raises `ValueError`
    for a teacher that TRL would choose in another way (`teacher_model_kind`, `use_teacher_server`).
    """

    def __init__(
        self,
        model: Any,
        reference: PreTrainedModel,
        policy_weight: float,
        args: SDPOConfig,
        reference_reads: ReferenceReads = "prompt",
        **kwargs: Any,
    ) -> None:
        if args.teacher_model_kind != "live" or args.use_teacher_server:
            raise ValueError(
                f"teacher_model_kind is {args.teacher_model_kind!r} and use_teacher_server {args.use_teacher_server}, "
                "but the teacher is the live policy with the reference; set teacher_model_kind='live', and leave out "
                "the other"
            )
        super().__init__(model, args=args, **kwargs)
        reference = reference.to(self.accelerator.device)
        self.teacher_model = TrustRegionTeacher(self.model, reference, policy_weight, reference_reads)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.teacher_model.set_prompts(inputs["prompt_ids"], inputs["prompt_mask"])
        return super().compute_loss(model, inputs, *args, **kwargs)
