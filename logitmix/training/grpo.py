"""GRPO of the mixture, on TRL's trainer.

It departs from canonical GRPO in four things (Gan & Zhu, arXiv 2605.20555, eq. 3-6):

- rollouts are sampled token by token from the mixture `softmax((1 - alpha) z_policy + alpha z_anchor)`;
- both sides of the ratio, and so the clip, are the mixture's probabilities, never the policy's alone;
- the normaliser is per question, the tokens of that question's G rollouts (`loss_type="group"`);
- there is no KL term, and the gradient flows into the policy only, through the factor 1 - alpha.

All else (advantages, buffering, logging, several processes) is TRL's. A model without an anchor trains as TRL would.
"""

import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import FusedCausalLMOutput

from logitmix.generation import end_of_sequence_ids, generate_completions
from logitmix.members import load_member, require_same_tokenizer, require_tokenizer
from logitmix.mixing import Scheme
from logitmix.modeling import LogitMixForCausalLM

GROUP_LOSS = "group"

CARD = """---
library_name: transformers
tags: [trl, grpo, logitmix]
---
# {folder}

A mixture of language models, scheme {config.scheme}, trained with GRPO through logit averaging
([arXiv 2605.20555](https://arxiv.org/abs/2605.20555)). Members, the policy first: {members}; weights {config.weights}.

```python
from logitmix import LogitMixForCausalLM

model = LogitMixForCausalLM.from_pretrained("{folder}")
```
"""


@dataclass
class LogitMixGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what a mixture adds to it.

    Args:
        anchor: folder or hub id of the frozen anchor (the SFT model, in the paper). Without one, and with a model
            that is no mixture, this is TRL's GRPO.
        alpha: weight of the anchor, 0 <= alpha < 1; 0 is the policy alone. Default 0.5, or the mixture's own where
            the model is one.
        scheme: `"logit"` (the default) or `"prob"`; a mixture has its own.
        loss_type: `"group"` is eq. 6; TRL's own loss types can be chosen instead.
        stop_strings: texts that end a rollout, beside EOS; they stay in it.
        rollout_batch_size: rollouts sampled at a time on a device, where the KV cache of all of them does not fit.
    """

    anchor: str | None = field(default=None, metadata={"help": "Folder or hub id of the frozen anchor."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the anchor, default 0.5; 0 is the policy alone."}
    )
    scheme: Scheme | None = field(default=None, metadata={"help": "How the members mix, default logit."})
    loss_type: str = field(
        default=GROUP_LOSS,
        metadata={"help": "'group' normalises by the tokens of a question's rollouts (eq. 6); or one of TRL's."},
    )
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a rollout, beside EOS; they stay in it."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rollouts sampled at a time on a device; default all of a generation step."}
    )


class LogitMixGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for a mixture: same arguments, same dataset, same reward functions.

    `model` is the policy (a model, a folder or a hub id) with `args.anchor` set, or a `LogitMixForCausalLM`.

    Raises `ValueError` for options under which TRL would score or sample something else than the mixture.
    """

    _tag_names = ("trl", "grpo", "logitmix")

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: Any = None,
        args: LogitMixGRPOConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = LogitMixGRPOConfig() if args is None else args
        if not isinstance(args, LogitMixGRPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; LogitMixGRPOTrainer needs a LogitMixGRPOConfig")
        model = _build_model(model, args)
        is_mixture = isinstance(model, LogitMixForCausalLM)
        _refuse_unsuitable_options(args, model, kwargs)
        if kwargs.get("processing_class") is None:
            source = model.policy if is_mixture else model
            kwargs["processing_class"] = (model.tokenizer if is_mixture else None) or require_tokenizer(
                source.name_or_path, padding_side="left", truncation_side="left"
            )
        elif is_mixture and model.tokenizer is not None:
            require_same_tokenizer([kwargs["processing_class"], model.tokenizer])
        super().__init__(model, reward_funcs, args, **kwargs)
        _require_questions(self)
        _require_prompts_fit(self)
        if is_mixture:
            _score_mixture(model, self.temperature)
        if args.loss_type == GROUP_LOSS:
            # TRL's "dapo" divides by the tokens of the whole batch; with the advantages scaled as
            # `_generate_and_score_completions` does below, that is eq. 6's division by each question's tokens.
            self.loss_type = "dapo"
        self.stop_strings = list(args.stop_strings or [])
        self.eos_token_ids = end_of_sequence_ids(self.model, self._tokenizer)
        if not self.use_vllm:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        """Rollouts from the mixture, under the trainer's sampling settings and no checkpoint's."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            size = self.args.rollout_batch_size or len(prompt_ids)
            batches = [prompt_ids[start : start + size] for start in range(0, len(prompt_ids), size)]
            completion_ids = [
                ids
                for batch in batches
                for ids in generate_completions(
                    model, self._tokenizer, batch, self.generation_kwargs, self.stop_strings
                )
            ]
        return completion_ids, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The mixture's own card; TRL's names the one base model that a mixture does not have."""
        if not isinstance(self.model, LogitMixForCausalLM):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            members = [member.name_or_path or type(member).__name__ for member in self.model.members]
            folder = Path(self.args.output_dir)
            (folder / "README.md").write_text(
                CARD.format(folder=folder.name, members=members, config=self.model.config)
            )

    def _generate(self, prompts: list) -> tuple:
        mode = "train" if self.model.training else "eval"
        output = super()._generate(prompts)
        if self.stop_strings:
            # TRL takes a completion without EOS for truncated
            completion_ids, completions = output[1], output[3]
            stopped = [
                ids[-1] in self.eos_token_ids or any(stop in _text(completion) for stop in self.stop_strings)
                for ids, completion in zip(completion_ids, completions, strict=True)
            ]
            self._log_truncation(mode, [len(ids) for ids in completion_ids], stopped)
        return output

    def _log_truncation(self, mode: str, lengths: list[int], stopped: list[bool]) -> None:
        """TRL's metrics on completion lengths again, now that it is known which completions ended by themselves."""
        device = self.accelerator.device
        lengths_N = self.accelerator.gather(torch.tensor(lengths, device=device)).float()
        stopped_N = self.accelerator.gather(torch.tensor(stopped, device=device))
        ended_N = lengths_N[stopped_N] if stopped_N.any() else torch.zeros(1, device=device)
        metrics = self._metrics[mode]
        metrics["completions/clipped_ratio"][-1] = 1 - stopped_N.float().mean().item()
        metrics["completions/mean_terminated_length"][-1] = ended_N.mean().item()
        metrics["completions/min_terminated_length"][-1] = ended_N.min().item()
        metrics["completions/max_terminated_length"][-1] = ended_N.max().item()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.loss_type == GROUP_LOSS:
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            lengths = self.accelerator.gather(mask.sum(1))
            factors = group_factors(lengths, num_generations)
            start = self.accelerator.process_index * len(mask)
            output["advantages"] = output["advantages"] * factors[start : start + len(mask)]
        return output


def group_factors(lengths_N: Tensor, num_generations: int) -> Tensor:
    """Factors `[N]` on the advantages that turn a mean over all tokens into eq. 6's mean over questions.

    `lengths_N` are the completion lengths of N = Q·G rollouts, a question's G beside each other. A rollout of
    question q gets `(Σ tokens) / (Q · tokens of q)`: since `min(ρA, clip(ρ)A)` scales with a positive factor on A,

        1/Σtokens · Σ_q Σ_{i∈q,t} min(ρA, clip(ρ)A) · factor_q  =  1/Q · Σ_q 1/tokens_q · Σ_{i∈q,t} min(ρA, clip(ρ)A)

    A question without any token has nothing to weigh and gets 0.
    """
    tokens_Q = lengths_N.view(-1, num_generations).sum(1).float()
    factors_Q = tokens_Q.sum() / (len(tokens_Q) * tokens_Q.clamp(min=1)) * (tokens_Q > 0)
    return factors_Q.repeat_interleave(num_generations)


def _build_model(model: PreTrainedModel | str, args: LogitMixGRPOConfig) -> PreTrainedModel:
    """The model to train; `args.alpha` and `args.scheme` say afterwards what holds."""
    if args.alpha is not None and not 0 <= args.alpha < 1:
        raise ValueError(
            f"alpha is {args.alpha}; training needs 0 <= alpha < 1, since the policy's gradient has the factor "
            "1 - alpha"
        )
    # TRL's default: float32 weights, under bf16 autocast unless told otherwise
    init_kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if args.anchor is not None:
        if isinstance(model, LogitMixForCausalLM):
            raise ValueError(
                f"the model is a mixture with an anchor of its own, and anchor is {args.anchor!r} as well; "
                "give only one"
            )
        alpha, scheme = 0.5 if args.alpha is None else args.alpha, args.scheme or "logit"
        model = LogitMixForCausalLM.from_members(model, args.anchor, alpha=alpha, scheme=scheme, **init_kwargs)
    elif isinstance(model, str):
        model = load_member(model, **init_kwargs)
    if not isinstance(model, LogitMixForCausalLM):
        if args.alpha is not None or args.scheme is not None:
            raise ValueError(
                f"alpha is {args.alpha} and scheme {args.scheme}, but there is no anchor to mix with; set anchor"
            )
        return model
    args.model_init_kwargs = None  # spent; TRL warns of them beside a model that is already built
    if args.scheme not in (None, model.config.scheme):
        raise ValueError(f"scheme is {args.scheme!r}, but the mixture was built with {model.config.scheme!r}")
    if args.alpha is not None:
        model.alpha = args.alpha
    args.scheme = model.config.scheme
    args.alpha = model.alpha if len(model.config.weights) == 2 else None
    return model


def _refuse_unsuitable_options(args: LogitMixGRPOConfig, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if is_peft_model(model) and isinstance(model.get_base_model(), LogitMixForCausalLM):
        raise ValueError("a mixture with a PEFT adapter cannot be trained yet; train the policy's own weights")
    if args.loss_type == GROUP_LOSS and args.beta != 0:
        raise ValueError(
            f"beta is {args.beta} with loss_type 'group', whose objective (eq. 6) has no KL term; "
            "set beta=0, or loss_type='grpo' for canonical GRPO with KL"
        )
    if args.stop_strings and args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions would mask every completion that a stop string ended, since TRL takes it for "
            "truncated; set it to False, or leave out stop_strings"
        )
    if not isinstance(model, LogitMixForCausalLM):
        return
    for option, reason in {
        "beta": "the KL term would be to a copy of the mixture; the anchor already holds the policy",
        "use_liger_kernel": "its fused loss reads one model's hidden states",
        "cast_lm_head_to_fp32": "a mixture has no single head; its logits are mixed in float32 anyway",
        "use_vllm": "rollouts of a mixture through vLLM are not built yet",
        "use_transformers_continuous_batching": "its paged cache does not know members",
        "sync_ref_model": "there is no reference model beside the anchor",
    }.items():
        if getattr(args, option):
            raise ValueError(f"{option}={getattr(args, option)!r} cannot be used with a mixture: {reason}")
    if kwargs.get("peft_config") is not None:
        raise ValueError("peft_config cannot be used with a mixture yet; train the policy's own weights")
    if model.config.weights[0] <= 0:
        raise ValueError(
            f"the policy's weight in the mixture is {model.config.weights[0]}; the gradient has it as a factor, so "
            "training needs it above 0"
        )


def _require_questions(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` where a generation step needs more questions than there are: no step would be taken."""
    needed = trainer.args.generation_batch_size // trainer.num_generations
    if isinstance(trainer.train_dataset, Dataset) and len(trainer.train_dataset) < needed:
        raise ValueError(
            f"the data set has {len(trainer.train_dataset)} questions, fewer than the {needed} of a generation step "
            f"(generation_batch_size {trainer.args.generation_batch_size} / num_generations "
            f"{trainer.num_generations}); use smaller batches or more data"
        )


def _require_prompts_fit(trainer: GRPOTrainer) -> None:
    """Raise `ValueError` before the first step where a prompt and its completion exceed the context."""
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or not isinstance(trainer.train_dataset, Dataset):
        return
    for start in range(0, len(trainer.train_dataset), 1000):
        prompts = trainer.train_dataset[start : start + 1000]["prompt"]
        for offset, ids in enumerate(trainer._tokenize_prompts(prompts)[0]):
            if len(ids) + trainer.max_completion_length > context:
                raise ValueError(
                    f"prompt {start + offset} has {len(ids)} tokens; with max_completion_length "
                    f"{trainer.max_completion_length} that exceeds the members' context of {context}. "
                    "Shorten or drop the prompt, or lower max_completion_length"
                )


def _score_mixture(model: LogitMixForCausalLM, temperature: float) -> None:
    """Give the model's forward TRL's scoring protocol, answered by the mixture.

    TRL asks for log-probabilities with `model(..., labels=labels, fused_lm_head=True)`, a forward that it has put on
    the model itself and that reads `base_model` and `get_output_embeddings()`. This takes that forward's place. It
    stays a call of the model, so that wrappers (DDP, FSDP) see it.
    """

    def forward(
        self: LogitMixForCausalLM, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return type(self).forward(self, *args, labels=labels, **kwargs)
        assert labels is not None
        log_probs, entropy = self.score(kwargs["input_ids"], kwargs["attention_mask"], labels, temperature)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    # `generate` checks its arguments against this signature
    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _text(completion: Any) -> str:
    """A completion's text; TRL gives conversational ones as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
