"""GRPO of a mixture: the algorithm, over TRL's trainer. Read it from top to bottom.

It differs from canonical GRPO in four points (Gan & Zhu, arXiv 2605.20555, eq. 3-6):

- rollouts are sampled token by token from the mixture `softmax((1 - alpha) z_policy + alpha z_anchor)`: `sample`;
- both sides of the ratio, and so its clip, are probabilities of the mixture, not of the policy alone (`target.py` has
  the exception): `score` of the present policy, `score_tokens` of the old one;
- the normaliser is per question, the tokens of that question's G rollouts (`loss_type="group"`): `question_weights`;
- the loss has no KL term, and its gradient reaches the policy only, with the factor 1 - alpha: `loss`.

`make_batch` runs once an outer step, `loss` once a micro-batch. Advantages, buffering, logging and several processes
are TRL's. A model without an anchor trains as in TRL, with this normaliser unless another `loss_type` is set.

Shape legend: Q questions, G rollouts each, N = Q·G rollouts of all processes, B those of a process, T completion
tokens, F reward functions.
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
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.router import has_load_balancing_loss
from logitmix.training.alpha.checks import validate_alpha_controller
from logitmix.training.alpha.validation import FreshQuestions, validation_questions
from logitmix.training.batch import Batch, TokenScores, own_tokens, scored_inputs
from logitmix.training.checkpointing.resume import Checkpointing, State
from logitmix.training.config import GROUP_LOSS, LogitMixGRPOConfig, build_model
from logitmix.training.config_checks import validate_config
from logitmix.training.data_checks import validate_data, validate_lengths, validate_no_images
from logitmix.training.dropout import disable_dropout
from logitmix.training.fsdp import prepare_fsdp
from logitmix.training.model_card import write_model_card
from logitmix.training.monitoring.finite import require_finite_parameters
from logitmix.training.monitoring.monitor import Monitor
from logitmix.training.offload import AnchorOffload
from logitmix.training.outer_steps import outer_step_callbacks
from logitmix.training.rollouts.dynamic_sampling import QuestionStream, has_spread, refill
from logitmix.training.rollouts.vllm import mixture_for_vllm, sampling_parameters
from logitmix.training.sampling_checks import validate_suppressed_tokens
from logitmix.training.scoring import MixtureScorer, loss_coefficients, on_supports
from logitmix.training.target import add_sampling_log_probs, target_weights
from logitmix.training.tokenizer import prepare_tokenizer
from logitmix.training.trl_patches import PatchedGRPOTrainer, reference_is_a_copy, without_reference_model


class LogitMixGRPOTrainer(PatchedGRPOTrainer):
    """TRL's `GRPOTrainer` for a mixture: the same arguments, data sets and reward functions.

    Args:
        model: the policy (a model, a folder or a hub id) with `args.anchor` set, or a `LogitMixForCausalLM`.
        validation_dataset: held-out questions for an `args.alpha_controller` that validates, with the columns of
            `train_dataset`. Without it, training questions are used and left out of training in that pass.
        peft_config: gives the policy a LoRA adapter, as in TRL. `LogitMixForCausalLM.from_members` says which
            anchors then share the policy's weights.

    Raises `ValueError` for options under which TRL would score or sample something other than the mixture.
    """

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
        set_seed(args.seed)  # a new adapter starts at random: by the seed as in TRL, and the same in every process
        source = model if isinstance(model, str) else None
        model = build_model(model, args, kwargs.get("peft_config"))
        is_mixture = isinstance(model, LogitMixForCausalLM)
        if is_mixture:
            kwargs.pop("peft_config", None)  # its policy has the adapter; TRL would wrap the whole mixture
        validate_config(args, model, kwargs)
        validate_alpha_controller(args, model, validation_dataset, kwargs)
        kwargs["processing_class"] = prepare_tokenizer(
            kwargs.get("processing_class"), model, source, args, reward_funcs
        )
        in_vllm = args.use_vllm and is_mixture
        with (
            without_reference_model(args) if is_mixture else reference_is_a_copy(model),
            mixture_for_vllm(model, kwargs["processing_class"], args) if in_vllm else nullcontext(),
        ):
            super().__init__(model, reward_funcs, args, **kwargs)
        if is_mixture:
            self.beta = args.beta
            self.ref_model = self._score_anchor if args.beta != 0 else None
            if self.aux_loss_enabled:
                self.aux_loss_enabled = has_load_balancing_loss(model.policy)
        validate_data(self, validation_dataset)
        require_finite_parameters(self.model)

        self.scorer = MixtureScorer(model, args) if is_mixture else None
        self.offload = AnchorOffload.of(self)
        self.anchor_states: list | None = None  # of the outer step being sampled, if they are kept
        self.supports: list | None = None  # of its completions, with `score_truncated`
        states = self.rollout_states() | ({} if self.scorer is None else self.scorer.states())
        if args.dynamic_sampling == "refill":
            self.refill_questions = QuestionStream(len(self.train_dataset), args.seed)
            states["refills"] = State(self.refill_questions.state_dict, self.refill_questions.load_state_dict)
        self.validation_questions = validation_questions(self, validation_dataset)
        self._set_ends()
        if args.disable_dropout:
            disable_dropout(self.model)
        prepare_fsdp(self)
        self.monitor = Monitor(self)
        self.checkpointing = Checkpointing(self, states)
        for callback in outer_step_callbacks(self, self.validation_questions):
            self.add_callback(callback)

    # --- what is sampled (eq. 3) --------------------------------------------------------------------------------

    def _set_ends(self) -> None:
        """Set what ends a rollout, for `generate` and for a mixture in vLLM; TRL sets it for a single model there."""
        self.stop_strings = list(self.args.stop_strings or [])
        self.eos_token_ids = get_eos_token_ids(self.model, self.text_tokenizer)
        validate_suppressed_tokens(self.args, self.eos_token_ids)
        if not self.use_vllm:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        elif isinstance(self.model, LogitMixForCausalLM):
            added_tokens = self.text_tokenizer.get_added_vocab()
            self.vllm_generation.generation_kwargs = sampling_parameters(
                self.args.generation_kwargs, self.stop_strings, self.eos_token_ids, added_tokens
            )

    def check_prompts(self, prompt_ids: list[list[int]]) -> None:
        validate_lengths(self, prompt_ids, "the outer step's prompt")

    def sample(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        """Rollouts from the mixture, with the trainer's sampling settings, not the checkpoint's."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super().sample(prompt_ids, *args, **kwargs)
        self.supports = [] if self.args.score_truncated else None
        return self.decode(prompt_ids, self.generation_kwargs, supports=self.supports), None

    def decode(
        self,
        prompt_ids: Sequence[Sequence[int]],
        settings: dict[str, Any],
        alphas: Sequence[float] | None = None,
        supports: list | None = None,
    ) -> list[list[int]]:
        """Completions of the model in training, `rollout_batch_size` at a time; `alphas` has one value per prompt."""
        completion_ids = []
        with self.generation_model() as model:
            size = self.args.rollout_batch_size or len(prompt_ids)
            for start in range(0, len(prompt_ids), size):
                alpha: dict[str, Any] = {} if alphas is None else {"alpha": alphas[start : start + size]}
                completion_ids += generate_completions(
                    model, self.text_tokenizer, prompt_ids[start : start + size], settings, self.stop_strings,
                    self.args.decoding, self.monitor.decoding, supports=supports, **alpha,
                )  # fmt: skip
        return completion_ids

    def decode_greedy(self, prompt_ids: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        """Greedy completions of the mixture in training, each prompt at its own alpha."""
        if self.use_vllm:
            self.sync_stale_vllm_weights()
            completion_ids: list[list[int]] = self.vllm_generation.greedy(prompt_ids, alphas)
            return completion_ids
        settings = self.generation_kwargs | GREEDY | dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        return self.decode(prompt_ids, settings, alphas)

    # --- what a completion earns (eq. 4) ------------------------------------------------------------------------

    def compute_rewards(self, rows: Any, prompts: list, completions: list, completion_ids: list) -> Tensor:
        """The rewards `[N, F]`, all of them finite; TRL turns their weighted sums into advantages."""
        with self.monitor.timed("rewards"):
            rewards_NF = super().compute_rewards(rows, prompts, completions, completion_ids)
        self.monitor.require_finite_rewards(rewards_NF, prompts, completions)
        return rewards_NF

    # --- the batch of an outer step -----------------------------------------------------------------------------

    def make_batch(self, rows: list[dict[str, Any]]) -> Batch:
        """Sample G rollouts a question, reward and score them, choose the questions that count, and weigh them."""
        validate_no_images(self, rows, "the outer step's row")
        self.offload.fetch()
        batch, rewards_NF = self._sample_batch(rows)
        kept_Q = None
        if self.model.training:
            batch, kept_Q = self._choose_questions(batch, rewards_NF)
        if self.args.loss_type == GROUP_LOSS:
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            mask_BT = own_tokens(batch)
            weights_N = question_weights(self.accelerator.gather(mask_BT.sum(1)), num_generations, kept_Q)
            start = self.accelerator.process_index * len(mask_BT)
            batch["question_weights"] = weights_N[start : start + len(mask_BT)]
        return batch

    def _sample_batch(self, rows: list[dict[str, Any]]) -> tuple[Batch, Tensor]:
        """TRL's batch and rewards, with the anchors' states where scoring the old policy has computed them."""
        scorer = self.scorer if self.model.training else None
        self.anchor_states = [] if scorer is not None and scorer.keeps_anchor_states else None
        batch, rewards_NF = self.trl_batch(rows)
        add_sampling_log_probs(self, batch)
        if self.args.offload_anchor and scorer is not None and not self.anchor_states:  # nothing had to be scored
            self.anchor_states = scorer.anchor_states(batch, self.accelerator)
        if self.anchor_states:
            batch["anchor_states"] = self.anchor_states
        if self.supports is not None:
            batch["supports"] = self.supports
        self.anchor_states = self.supports = None
        return batch, rewards_NF

    def _choose_questions(self, batch: Batch, rewards_NF: Tensor) -> tuple[Batch, Tensor | None]:
        """Dynamic sampling: the batch, refilled if asked for, and which of its questions count (None: all)."""
        metrics = self.step_metrics
        spread_Q = has_spread(rewards_NF, self.reward_weights, self.num_generations)
        metrics["groups/without_spread"].append(1 - spread_Q.float().mean().item())
        if self.args.dynamic_sampling == "off":
            return batch, None
        if self.args.dynamic_sampling == "refill":
            batch, spread_Q = refill(
                self, batch, spread_Q, self._sample_batch, self.refill_questions, self.args.max_refills
            )
        metrics["groups/kept"].append(spread_Q.float().mean().item())
        return batch, spread_Q

    # --- what is scored (eq. 5) ---------------------------------------------------------------------------------

    def score_tokens(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities without gradients: of the mixture that sampled, and of the anchor for a KL."""
        if torch.is_grad_enabled():
            return super().score_tokens(model, *args, **kwargs)
        if model is self.model and self.anchor_states is not None:
            model = self._score_and_keep
        if self.supports is not None:
            model = on_supports(model, self.supports)
        with self.monitor.timed("scoring"):
            return super().score_tokens(model, *args, **kwargs)

    def _score_and_keep(self, **inputs: Any) -> FusedCausalLMOutput:
        """The mixture's scores; the anchors' states are kept for the updates on the same tokens."""
        scores = self.model(**inputs, keep_anchor_states=True)
        if self.anchor_states is not None and scores.anchor_states is not None:
            self.anchor_states += scores.anchor_states.by_sequence
        return scores

    def _score_anchor(self, **inputs: Any) -> FusedCausalLMOutput:
        """The anchor's scores, for `kl_to="anchor"`: the mixture's at weight 1 of the anchor."""
        scores: FusedCausalLMOutput = self.model(**inputs, weights=[0.0, 1.0])
        return scores

    def score(self, model: Any, batch: Batch, loss_type: str) -> TokenScores:
        """Log-probabilities of the mixture (`train_target`: of the policy) with gradients, one forward of the model.

        The fused loss head computes its gradient in the forward pass where it knows the derivative of the loss.
        """
        input_ids, attention_mask, labels = scored_inputs(batch)
        weights, supports = target_weights(self), batch.get("supports")
        options: dict[str, Any] = {"compute_aux_loss": self.aux_loss_enabled, "supports": supports, "weights": weights}
        if torch.is_grad_enabled():
            options["diagnose"] = weights is None and all(self.model.config.weights)
            if self.args.loss_head == "fused":
                options["coefficients"] = loss_coefficients(self, batch, labels[:, 1:] != -100, loss_type)
                options["anchor_states"] = batch.get("anchor_states")
        with self.accelerator.autocast():
            scores = model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **options
            )
        log_probs, entropy = (x[:, -batch["completion_ids"].shape[1] :] for x in (scores.log_probs, scores.entropy))
        return TokenScores(log_probs, entropy, scores.aux_loss, diagnostics=scores.diagnostics)

    # --- the loss (eq. 6) ---------------------------------------------------------------------------------------

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Eq. 6 on a micro-batch, or one of TRL's losses.

            1/Q · Σ_q 1/(Σ_{i∈q} |y_i|) · Σ_{i∈q} Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε) A)

        It is TRL's "dapo", a mean over all tokens, of advantages that carry each question's weight.
        """
        loss_type = self.args.loss_type
        if loss_type == GROUP_LOSS:
            loss_type = "dapo"
            # a checkpoint of logitmix 0.1.0 holds advantages that are weighted already
            batch = batch | {"advantages": batch["advantages"] * batch.get("question_weights", 1)}
        self.offload.release()
        scores = None if self.scorer is None else self.score(model, batch, loss_type)
        loss, scores = self.trl_loss(model, batch, loss_type, scores)
        self.monitor.observe_loss(batch, scores, loss.detach())
        return loss

    # --- beside the algorithm -----------------------------------------------------------------------------------

    def train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        """TRL's order of questions, or the one that leaves validation questions out."""
        if isinstance(self.validation_questions, FreshQuestions):
            return self.validation_questions
        return super().train_sampler(dataset)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.model, LogitMixForCausalLM):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_model_card(self.model, Path(self.args.output_dir))


def question_weights(lengths_N: Tensor, num_generations: int, kept_Q: Tensor | None = None) -> Tensor:
    """Eq. 6's normaliser: weights `[N]` that turn a mean over all tokens into a mean over questions.

    `lengths_N` are the completion lengths of N = Q·G rollouts, a question's G next to each other. A rollout of
    question q gets `(Σ tokens) / (Q · tokens of q)`. As `min(ρA, clip(ρ)A)` scales with a positive factor on A,

        1/Σtokens · Σ_q Σ_{i∈q,t} min(ρA, clip(ρ)A) · weight_q  =  1/Q · Σ_q 1/tokens_q · Σ_{i∈q,t} min(ρA, clip(ρ)A)

    A question without tokens gets 0. With `kept_Q` the mean is over the questions kept: Q is their number, and the
    others get 0.
    """
    tokens_Q = lengths_N.view(-1, num_generations).sum(1).float()
    kept_Q = torch.ones_like(tokens_Q) if kept_Q is None else kept_Q.to(tokens_Q)
    weights_Q = kept_Q * tokens_Q.sum() / (kept_Q.sum().clamp(min=1) * tokens_Q.clamp(min=1)) * (tokens_Q > 0)
    return weights_Q.repeat_interleave(num_generations)
