"""Distillation of a mixture into one model, over TRL's trainer.

The student samples, and is trained to match the mixture's distribution at each of its own tokens (on-policy
distillation, arXiv 2306.13649). Prompts, buffering, logging and several processes are TRL's; the teacher's side is
ours, since TRL's reads the backbone and one output head of its teacher.

Shape legend: B sequences of a process, T completion tokens, N compared tokens.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from trl import DistillationConfig

from logitmix.loss_head.distiller import FusedDistiller, ReferenceDistiller
from logitmix.loss_head.libraries import restore_choices
from logitmix.mixture.adapters import validate_adapter_targets
from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.decoding.loop import Decoding
from logitmix.mixture.generation import generate_completions, get_eos_token_ids, validate_stop_strings
from logitmix.mixture.loading import validate_padding, validate_same_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.tokenizers import leave_texts_open
from logitmix.training.checkpointing.resume import Checkpointing, State
from logitmix.training.config import LossHead
from logitmix.training.distillation_options import validate_distillation_options
from logitmix.training.distillation_trl_patches import PatchedDistillationTrainer
from logitmix.training.fsdp import prepare_fsdp
from logitmix.training.monitoring.finite import require_finite_parameters
from logitmix.training.resumable_config import ResumableConfig
from logitmix.training.rollouts.vllm import sampling_parameters
from logitmix.training.student_adapters import shared_bytes
from logitmix.training.students import num_logits, validate_student, validate_vocabulary


@dataclass
class LogitMixDistillationConfig(ResumableConfig, DistillationConfig):
    """TRL's `DistillationConfig`, and the options of a teacher that is a mixture.

    Args:
        beta: the divergence, as in TRL: see `token_divergence`.
        lmbda: share of the updates whose completions the student samples, as in TRL's `GKDConfig`; the mixture samples
            the others. 1 is on-policy.
        stop_strings: texts that end a completion, like EOS; they are kept in it.
        decoding: of the mixture's completions, as `LogitMixForCausalLM.generate` has it.
        loss_head: `"fused"` never holds the logits of all tokens; `"reference"` compares whole logits, for models
            whose output head the fused one does not support.
        resume_without_optimizer: see `ResumableConfig`.

    Raises `ValueError` for a value of another type, or outside its range.
    """

    beta: float = field(
        default=1.0,
        metadata={"help": "Divergence from the mixture: 1 reverse KL, 0 forward KL, between them generalised JSD."},
    )
    lmbda: float = field(
        default=1.0,
        metadata={"help": "Share of the updates whose completions the student samples; the mixture samples the rest."},
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a completion, like EOS; they are kept in it."}
    )
    decoding: Decoding = field(
        default="auto",
        metadata={
            "help": "Of the mixture's completions: 'joint' runs all members for each token, 'alternating' draws from "
            "the same distribution in fewer passes, 'auto' chooses the cheaper at every step."
        },
    )
    loss_head: LossHead = field(
        default="fused",
        metadata={"help": "'fused' never holds the logits of all tokens; 'reference' compares whole logits."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is {self.lmbda}; it must be between 0 (the mixture samples) and 1 (the student)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1, which keeps all tokens")
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; it must be at least 1")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True cannot be used: its fused losses know no teacher; leave it out")


class MixtureDistillationTrainer(PatchedDistillationTrainer):
    """Trains a student to match a mixture: TRL's `DistillationTrainer`, of a teacher that is a `LogitMixForCausalLM`.

    Args:
        model: the student, a causal language model or a `PeftModel` of one, with the mixture's tokenizer. It may share
            weights with the mixture that do not train, as `build_student` with `peft_config` does.
        teacher_model: the mixture. It is frozen.
        args, train_dataset, processing_class, …: as in TRL. The data set needs the column `prompt`.
        peft_config: gives the student a LoRA adapter, as in TRL.

    Raises `ValueError` for a teacher that is no mixture, a student that is one or a member of it, or has another
    vocabulary, options that have no effect, and prompts that leave no room for a completion in the context of one of
    the two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: LogitMixForCausalLM,
        args: LogitMixDistillationConfig,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher_model, LogitMixForCausalLM):
            raise ValueError(
                f"the teacher is a {type(teacher_model).__name__}, not a mixture; TRL's DistillationTrainer distils a "
                "single model"
            )
        validate_student(model, teacher_model)
        validate_distillation_options(args, kwargs)
        teacher_model.config.require_one_prompt("distillation")
        if teacher_model.config.cut is not None:
            raise ValueError(
                f"the mixture has plausibility {teacher_model.config.plausibility}: the tokens that it rules out have "
                "probability 0, from which a student's divergence is infinite; use config.set_plausibility(None)"
            )
        set_seed(args.seed)  # a new adapter starts at random
        validate_vocabulary(model, teacher_model)
        if kwargs.get("peft_config") is not None:
            validate_adapter_targets(model, kwargs["peft_config"])
        tokenizer = kwargs["processing_class"] = kwargs.get("processing_class") or teacher_model.tokenizer
        if tokenizer is None:
            raise ValueError("the mixture has no tokenizer of its own; pass it as processing_class")
        if teacher_model.tokenizer is not None:
            validate_same_tokenizer([teacher_model.tokenizer, tokenizer])
        validate_padding(tokenizer)
        leave_texts_open(tokenizer)
        self.stop_strings = list(args.stop_strings or [])
        if not args.use_vllm:
            validate_stop_strings(tokenizer, self.stop_strings)
        self.teacher: LogitMixForCausalLM = teacher_model.requires_grad_(False).eval()
        if kwargs.get("peft_config") is None and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "the student has no weights that train; load an adapter with is_trainable=True, or call "
                "student.requires_grad_(True)"
            )
        super().__init__(model, None, args, **kwargs)
        self.teacher.to(self.accelerator.device)
        student = self.base_student(self.model)
        self.distiller: FusedDistiller | ReferenceDistiller = ReferenceDistiller(self.teacher)
        states: dict[str, State] = {}
        if args.loss_head == "fused":
            fused = self.distiller = FusedDistiller(student, self.teacher)
            states["matrix_libraries"] = State(fused.read_libraries, restore_choices)
        require_finite_parameters(self.model)
        self._validate_train_dataset()
        # a completion ends where the student or the mixture would end it
        self.eos_token_ids = list(
            dict.fromkeys([*get_eos_token_ids(self.teacher, tokenizer), *get_eos_token_ids(student, tokenizer)])
        )
        self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self.padding_tokens = range(teacher_model.config.vocab_size, num_logits(student))
        if self.use_vllm:
            self.vllm_generation.generation_kwargs = sampling_parameters(
                args.generation_kwargs, self.stop_strings, self.eos_token_ids, tokenizer.get_added_vocab()
            )
            if self.padding_tokens:
                self.vllm_generation.generation_kwargs["allowed_token_ids"] = list(range(self.padding_tokens.start))
        self._validate_shared_weights(student)
        prepare_fsdp(self)
        self.checkpointing = Checkpointing(self, states)

    @staticmethod
    def base_student(student: Any) -> PreTrainedModel:
        """The causal language model that the student is, with its adapter's layers inside."""
        base: PreTrainedModel = student.get_base_model() if is_peft_model(student) else student
        return base

    # --- what is sampled ----------------------------------------------------------------------------------------

    def check_prompts(self, prompt_ids: list[list[int]]) -> None:
        self._validate_lengths(prompt_ids, "the update's prompt")

    def sample(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Completions by the student or, in a share 1 - `lmbda` of the updates, by the mixture."""
        if not self.student_samples():
            return self._decode(self.teacher, prompt_ids)
        if self.use_vllm:
            return super().sample(prompt_ids, *args, **kwargs)
        with self.generation_model() as model, torch.no_grad():
            return self._decode(model, prompt_ids)

    def student_samples(self) -> bool:
        """Whether the student samples for the present update: the same in every process, and after a resume."""
        if not self.model.training or self.args.lmbda == 1:
            return True
        return random.Random(f"{self.args.seed} {self.state.global_step}").random() < self.args.lmbda

    def _decode(self, model: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
        is_mixture = isinstance(model, LogitMixForCausalLM)
        decoding: Decoding = self.args.decoding if is_mixture else "joint"
        settings = self.generation_kwargs
        if self.padding_tokens and not is_mixture:  # the mixture has no embeddings of these
            settings = settings | {"suppress_tokens": [*(settings.get("suppress_tokens") or ()), *self.padding_tokens]}
        return generate_completions(model, self.text_tokenizer, prompt_ids, settings, self.stop_strings, decoding)

    # --- what is learnt -----------------------------------------------------------------------------------------

    def loss(self, student: PreTrainedModel, batch: dict[str, Any], num_tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The mean divergence of the student from the mixture over the completions' tokens; see `token_divergence`.

        Tokens that a tool wrote do not count. Raises `FloatingPointError` where it is not finite.
        """
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        of_model = batch["completion_mask"] * batch.get("tool_mask", 1)
        scored_BT = torch.cat([torch.zeros_like(batch["prompt_mask"]), of_model], dim=1)[:, 1:] != 0
        divergence_N, entropy_N = self.distiller(
            self.base_student(student), input_ids, attention_mask, scored_BT, self.args.beta, self.args.temperature
        )
        count = scored_BT.sum()
        total = divergence_N.sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss of update {self.state.global_step + 1} is {total.item()}; resume from the last checkpoint "
                "with another setting, such as a lower learning_rate, or with beta 0.5 where one of student and "
                "mixture rules out tokens of the other"
            )
        return total / (count.clamp(min=1) if num_tokens is None else num_tokens), entropy_N.detach().sum(), count

    # --- what is refused ----------------------------------------------------------------------------------------

    def _validate_shared_weights(self, student: PreTrainedModel) -> None:
        """Weights that the student shares with the mixture must stay as they are, where they are."""
        if not shared_bytes(student, self.teacher):
            return
        way_out = "build the student without peft_config, and pass it here"
        if self.use_vllm:
            raise ValueError(
                "use_vllm is set, and for vLLM TRL merges the student's adapter into weights that the mixture shares "
                f"and takes it out again, which rounds them; {way_out}"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"the student shares weights with the mixture, which FSDP or DeepSpeed would shard; {way_out}"
            )

    def _validate_train_dataset(self) -> None:
        if not isinstance(self.train_dataset, Dataset):
            return
        args = self.args
        needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        if len(self.train_dataset) < needed:
            raise ValueError(
                f"the data set has {len(self.train_dataset)} prompts, fewer than the {needed} of an update "
                f"(per_device_train_batch_size {args.per_device_train_batch_size} × gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} × {self.accelerator.num_processes} processes); use smaller "
                "batches or more data"
            )
        for start in range(0, len(self.train_dataset), 1000):
            prompts = self.train_dataset[start : start + 1000]["prompt"]
            self._validate_lengths(self.tokenize_prompts(prompts), "prompt", start)

    def _validate_lengths(self, prompt_ids: list[list[int]], name: str, start: int = 0) -> None:
        contexts = [context_length(config) for config in (self.base_student(self.model).config, self.teacher.config)]
        known = [context for context in contexts if context is not None]
        for offset, ids in enumerate(prompt_ids if known else []):
            validate_fits_context(
                min(known), len(ids), self.args.max_completion_length, f"{name} {start + offset}",
                "max_completion_length",
            )  # fmt: skip
