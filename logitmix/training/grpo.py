"""GRPO of the mixture, on TRL's trainer.

It departs from canonical GRPO in four things (Gan & Zhu, arXiv 2605.20555, eq. 3-6):

- rollouts are sampled token by token from the mixture `softmax((1 - alpha) z_policy + alpha z_anchor)`;
- both sides of the ratio, and so the clip, are the mixture's probabilities, never the policy's alone;
- the normaliser is per question, the tokens of that question's G rollouts (`loss_type="group"`);
- there is no KL term, and the gradient flows into the policy only, through the factor 1 - alpha.

All else (advantages, buffering, logging, several processes) is TRL's. A model without an anchor trains as TRL would.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from logitmix.mixture.generation import GREEDY, generate_completions, get_eos_token_ids
from logitmix.mixture.loading import require_tokenizer, validate_same_tokenizer
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.callback import AlphaControl, validate_alpha_controller
from logitmix.training.alpha.validation import FreshQuestions, validation_questions
from logitmix.training.checkpointing.resume import ResumableGRPO
from logitmix.training.config import GROUP_LOSS, LogitMixGRPOConfig, build_model
from logitmix.training.config_checks import require_prompts_fit, require_questions, validate_config
from logitmix.training.fsdp import ShardableGRPOTrainer
from logitmix.training.monitoring.trainer import WatchedGRPOTrainer
from logitmix.training.rollouts.dynamic_sampling import QuestionStream, has_spread, refill
from logitmix.training.rollouts.vllm import mixture_for_vllm, sampling_settings
from logitmix.training.scoring import MixtureScoring

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


class LogitMixGRPOTrainer(ResumableGRPO, ShardableGRPOTrainer, WatchedGRPOTrainer):
    """TRL's `GRPOTrainer` for a mixture: same arguments, same dataset, same reward functions.

    `model` is the policy (a model, a folder or a hub id) with `args.anchor` set, or a `LogitMixForCausalLM`.
    `peft_config` gives the policy a LoRA adapter, as in TRL; [`LogitMixForCausalLM.from_members`] says which anchors
    then share its weights.
    `validation_dataset` are held-out questions for an `args.alpha_controller` that validates, with the columns of
    `train_dataset`; without it these are training questions, which are left out of training in their pass.

    Raises `ValueError` for options under which TRL would score or sample something else than the mixture.
    """

    _tag_names = ("trl", "grpo", "logitmix")
    _last_loaded_step: int  # TRL's: the step whose weights vLLM has

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: Any = None,
        args: LogitMixGRPOConfig | None = None,
        validation_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = LogitMixGRPOConfig() if args is None else args
        if not isinstance(args, LogitMixGRPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; LogitMixGRPOTrainer needs a LogitMixGRPOConfig")
        set_seed(args.seed)  # an adapter's start is drawn: by the seed, as in TRL, and the same on every process
        model = build_model(model, args, kwargs.get("peft_config"))
        is_mixture = isinstance(model, LogitMixForCausalLM)
        if is_mixture:
            kwargs.pop("peft_config", None)  # its policy has the adapter; TRL would wrap the mixture
        validate_config(args, model, kwargs)
        validate_alpha_controller(args, model, validation_dataset, kwargs)
        if kwargs.get("processing_class") is None:
            source = model.policy if is_mixture else model
            kwargs["processing_class"] = (model.tokenizer if is_mixture else None) or require_tokenizer(
                source.name_or_path, padding_side="left", truncation_side="left"
            )
        elif is_mixture and model.tokenizer is not None:
            validate_same_tokenizer([kwargs["processing_class"], model.tokenizer])
        beta = args.beta
        if is_mixture:
            args.beta = 0.0  # else TRL would load a reference model; the anchor is there already
        in_vllm = args.use_vllm and is_mixture
        with mixture_for_vllm(model, kwargs["processing_class"], args) if in_vllm else nullcontext():
            super().__init__(model, reward_funcs, args, **kwargs)
        if is_mixture and beta != 0:
            args.beta = self.beta = beta
            self.ref_model = self._score_anchor
        require_questions(self)
        require_prompts_fit(self, self.train_dataset)
        require_prompts_fit(self, validation_dataset, "validation prompt")
        self.validation_questions = validation_questions(self, validation_dataset)
        self.scoring = MixtureScoring(model, self) if is_mixture else None
        if args.dynamic_sampling == "refill":
            self.refill_questions = QuestionStream(len(self.train_dataset), args.seed)
        if args.alpha_controller != "fixed":
            self.add_callback(AlphaControl(self, self.validation_questions))
        if args.loss_type == GROUP_LOSS:
            # TRL's "dapo" divides by the tokens of the whole batch; with the advantages scaled as
            # `_generate_and_score_completions` does below, that is eq. 6's division by each question's tokens.
            self.loss_type = "dapo"
        self.stop_strings = list(args.stop_strings or [])
        self.eos_token_ids = get_eos_token_ids(self.model, self._tokenizer)
        if in_vllm:
            self.vllm_generation.generation_kwargs = sampling_settings(
                args.generation_kwargs, self.stop_strings, self.eos_token_ids
            )
        elif not self.use_vllm:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    def _score_anchor(self, **inputs: Any) -> FusedCausalLMOutput:
        """The anchor's log-probabilities, for `kl_to="anchor"`: the mixture's, at weight 1 of the anchor."""
        scores: FusedCausalLMOutput = self.model(**inputs, weights=[0.0, 1.0])
        return scores

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        """Rollouts from the mixture, under the trainer's sampling settings and no checkpoint's."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.decode(prompt_ids, self.generation_kwargs), None

    def decode(
        self, prompt_ids: Sequence[Sequence[int]], settings: dict[str, Any], alphas: Sequence[float] | None = None
    ) -> list[list[int]]:
        """Completions of the model in training, `rollout_batch_size` at a time; `alphas` are one a prompt."""
        completion_ids = []
        with self.generation_model() as model:
            size = self.args.rollout_batch_size or len(prompt_ids)
            for start in range(0, len(prompt_ids), size):
                batch = prompt_ids[start : start + size]
                alpha = {} if alphas is None else {"alpha": alphas[start : start + size]}
                completion_ids += generate_completions(
                    model, self._tokenizer, batch, settings, self.stop_strings, **alpha
                )
        return completion_ids

    def decode_greedy(self, prompt_ids: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        """Greedy completions of the mixture in training, each prompt under its own alpha."""
        if self.use_vllm:
            if self.state.global_step != self._last_loaded_step:
                self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            completion_ids: list[list[int]] = self.vllm_generation.greedy(prompt_ids, alphas)
            return completion_ids
        settings = self.generation_kwargs | GREEDY | dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        return self.decode(prompt_ids, settings, alphas)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if isinstance(self.validation_questions, FreshQuestions):
            return self.validation_questions
        return super()._get_train_sampler(dataset)

    def _progress(self) -> dict[str, Any]:
        refills = self.refill_questions.state_dict() if self.args.dynamic_sampling == "refill" else None
        return super()._progress() | {"refills": refills}

    def _restore(self, progress: dict[str, Any]) -> None:
        super()._restore(progress)
        if progress["refills"] is not None:
            self.refill_questions.load_state_dict(progress["refills"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The mixture's own card; TRL's names the one base model that a mixture does not have."""
        if not isinstance(self.model, LogitMixForCausalLM):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            members = self.model.describe_members()
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

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with nullcontext() if self.scoring is None else self.scoring.loss_of(inputs):
            return super()._compute_loss(model, inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        sample = super()._generate_and_score_completions
        output = sample(inputs) if self.scoring is None else self.scoring.sampled(sample, inputs)
        kept_Q = None
        if self.model.training:
            spread_Q = has_spread(self._rewards_NF, self.reward_weights, self.num_generations)
            self._metrics["train"]["groups/without_spread"].append(1 - spread_Q.float().mean().item())
            if self.args.dynamic_sampling == "refill":
                output, spread_Q = refill(
                    self, output, lambda: self._rewards_NF, sample, self.refill_questions, self.args.max_refills
                )
            if self.args.dynamic_sampling != "off":
                kept_Q = spread_Q
                self._metrics["train"]["groups/kept"].append(kept_Q.float().mean().item())
        if self.args.loss_type == GROUP_LOSS:
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            mask = output["completion_mask"] * output.get("tool_mask", 1)
            lengths = self.accelerator.gather(mask.sum(1))
            factors = group_factors(lengths, num_generations, kept_Q)
            start = self.accelerator.process_index * len(mask)
            output["advantages"] = output["advantages"] * factors[start : start + len(mask)]
        return output


def group_factors(lengths_N: Tensor, num_generations: int, kept_Q: Tensor | None = None) -> Tensor:
    """Factors `[N]` on the advantages that turn a mean over all tokens into eq. 6's mean over questions.

    `lengths_N` are the completion lengths of N = Q·G rollouts, a question's G beside each other. A rollout of
    question q gets `(Σ tokens) / (Q · tokens of q)`: since `min(ρA, clip(ρ)A)` scales with a positive factor on A,

        1/Σtokens · Σ_q Σ_{i∈q,t} min(ρA, clip(ρ)A) · factor_q  =  1/Q · Σ_q 1/tokens_q · Σ_{i∈q,t} min(ρA, clip(ρ)A)

    A question without any token has nothing to weigh and gets 0. Where `kept_Q` is given, the mean is over the
    questions kept: Q is their number, and the others get 0.
    """
    tokens_Q = lengths_N.view(-1, num_generations).sum(1).float()
    kept_Q = torch.ones_like(tokens_Q) if kept_Q is None else kept_Q.to(tokens_Q)
    factors_Q = kept_Q * tokens_Q.sum() / (kept_Q.sum().clamp(min=1) * tokens_Q.clamp(min=1)) * (tokens_Q > 0)
    return factors_Q.repeat_interleave(num_generations)


def _text(completion: Any) -> str:
    """A completion's text; TRL gives conversational ones as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
