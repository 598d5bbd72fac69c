"""What training replaces in TRL's trainers, and the private names of TRL it reads.

`PatchedGRPOTrainer` gives TRL's private methods public names, so that `grpo.py` overrides each of them once:

| TRL 1.16 | here | |
|---|---|---|
| `_calculate_rewards` | `compute_rewards` | rewards `[N, F]` of all processes |
| `_generate_and_score_completions` | `make_batch` | the batch of an outer step |
| `_get_per_token_logps_and_entropies` | `score_tokens` | log-probabilities without gradients |
| `_compute_loss` | `loss` | the loss of a micro-batch |
| `_get_train_sampler` | `train_sampler` | the order of questions |

Written against TRL 1.16; tests/training/test_trl_patches.py is the contract.

Shape legend: B sequences of a process, T completion tokens, N completions of all processes, F reward functions.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer import grpo_trainer

from logitmix.training.batch import Batch, TokenScores
from logitmix.training.checkpointing.resume import State, by_epoch
from logitmix.training.model_card import NamesLocalModels
from logitmix.training.rollouts.trl_patches import PatchedRollouts
from logitmix.training.transformers_patches import PatchedTrainer

if TYPE_CHECKING:
    from logitmix.training.monitoring.monitor import Monitor


class PatchedTRLTrainer(NamesLocalModels, PatchedTrainer):
    """What TRL's trainers have in common."""

    _metrics: dict[str, defaultdict[str, list[float]]]

    @property
    def step_metrics(self) -> defaultdict[str, list[float]]:
        """Values since the last log of training, which TRL logs as their means."""
        return self._metrics["train"]

    @step_metrics.setter
    def step_metrics(self, metrics: defaultdict[str, list[float]]) -> None:
        self._metrics["train"] = metrics


class PatchedSFTTrainer(PatchedTRLTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with exact resume."""

    RUNNING_TOTALS = (*PatchedTrainer.RUNNING_TOTALS, "_total_train_tokens")


class PatchedGRPOTrainer(PatchedTRLTrainer, PatchedRollouts):
    """TRL's `GRPOTrainer` with exact resume, monitoring, and public names for what a subclass overrides."""

    RUNNING_TOTALS = (*PatchedSFTTrainer.RUNNING_TOTALS, "_step")
    _tag_names = ("trl", "grpo", "logitmix")  # of the model card
    monitor: Monitor
    aux_loss_enabled: bool  # whether TRL adds the load-balancing loss of a mixture of experts

    # --- what a subclass overrides ------------------------------------------------------------------------------

    def compute_rewards(self, rows: Any, prompts: list, completions: list, completion_ids: list) -> Tensor:
        """The rewards `[N, F]` of this process's completions, gathered from all processes."""
        return super()._calculate_rewards(rows, prompts, completions, completion_ids)

    def make_batch(self, rows: list[dict[str, Any]]) -> Batch:
        """The batch of an outer step: sampled, scored, rewarded, with advantages."""
        return self.trl_batch(rows)[0]

    def score_tokens(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and, where asked for, entropies `[B, T]` and the auxiliary loss of an MoE."""
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a micro-batch, scaled for gradient accumulation."""
        return self.trl_loss(model, batch, self.args.loss_type)[0]

    def train_sampler(self, dataset: Any = None) -> Sampler:
        """The order of questions; unlike TRL's, it is the same in an epoch whether or not the run was resumed."""
        return by_epoch(super()._get_train_sampler(dataset))

    # --- TRL's own computations, with what it computes and drops ------------------------------------------------

    def trl_batch(self, rows: list[dict[str, Any]]) -> tuple[Batch, Tensor]:
        """TRL's batch of rows of the data set, and the rewards `[N, F]` behind its advantages.

        The batch also holds this process's share of the rewards, which is saved when a number is not finite.
        """
        batch: Batch = super()._generate_and_score_completions(rows)
        rewards_NF = self._rewards_NF
        start = self.accelerator.process_index * len(rows)
        return batch | {"rewards": rewards_NF[start : start + len(rows)]}, rewards_NF

    def trl_loss(
        self, model: Any, batch: Batch, loss_type: str, scores: TokenScores | None = None
    ) -> tuple[Tensor, TokenScores]:
        """TRL's loss of a micro-batch and the scores it used: those given, or else those TRL computes."""
        self.loss_type, self._loss_scores, self._in_loss = loss_type, scores, True
        try:
            loss = super()._compute_loss(model, batch)
            assert self._loss_scores is not None
            return loss, self._loss_scores
        finally:
            self._loss_scores, self._in_loss = None, False

    _loss_scores: TokenScores | None = None
    _in_loss = False

    # --- TRL's private methods, routed to the names above -------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        self._rewards_NF = self.compute_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_NF

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        return self.make_batch(inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._in_loss:
            return self.score_tokens(model, *args, **kwargs)
        if self._loss_scores is None:
            self._loss_scores = TokenScores(*super()._get_per_token_logps_and_entropies(model, *args, **kwargs))
        return self._loss_scores[:3]

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        return self.loss(model, inputs)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return self.train_sampler(dataset)

    # --- monitoring ---------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.monitor.clock.timed("step"):  # unconditionally: `training_step` itself sets the training mode
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Batch:
        with self.monitor.timed("inputs"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        with self.monitor.rollouts(prompts):
            output = super()._generate(prompts)
        self.monitor.count_rollouts(completion_ids=output[1], tool_mask=output[2], completions=output[3])
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.monitor.complete_metrics()
        super().log(logs, start_time)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self.monitor.finite_grad_norm(super()._get_grad_norm(model, grad_norm))

    # --- TRL's private state ------------------------------------------------------------------------------------

    @property
    def mode_metrics(self) -> defaultdict[str, list[float]]:
        """As `step_metrics`, of training or of TRL's evaluation, whichever is running."""
        return self._metrics["train" if self.model.training else "eval"]

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, also where `processing_class` is a processor of several modalities."""
        return self._tokenizer

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has a term in the entropy, of a fixed or an adaptive coefficient."""
        return self._entropy_bonus_enabled

    def unlogged_rewards(self, rows: Any, prompts: list, completions: list, completion_ids: list) -> Tensor:
        """Rewards `[N, F]` of completions that are not rollouts: what the reward functions log is dropped."""
        rewards_NF = self._calculate_rewards(rows, prompts, completions, completion_ids)
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        return rewards_NF

    @property
    def outer_step_is_complete(self) -> bool:
        """Whether TRL samples before the next update: no micro-batch of the current rollouts is left."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    @property
    def completion_log(self) -> Mapping[str, Any]:
        """The last outer step's prompts, completions, rewards by function, and advantages, as TRL logs them."""
        return self._logs

    def rollout_states(self) -> dict[str, State]:
        """Rollouts still in use and the log of completions, which a checkpoint of TRL's trainer leaves out."""
        return {
            "rollouts": State(
                lambda: None if self.outer_step_is_complete else self._buffered_inputs,
                lambda rollouts: setattr(self, "_buffered_inputs", rollouts),
            ),
            "completions": State(self._read_completion_log, self._write_completion_log),
        }

    def _read_completion_log(self) -> dict[str, Any] | None:
        if not self.log_completions:
            return None
        return {
            name: {key: list(rows) for key, rows in column.items()} if isinstance(column, dict) else list(column)
            for name, column in self._logs.items()
            if name != "images"
        }

    def _write_completion_log(self, log: Mapping[str, Any]) -> None:
        for name, column in log.items():
            if isinstance(column, dict):
                for key, rows in column.items():
                    self._logs[name][key].extend(rows)
            else:
                self._logs[name].extend(column)


@contextmanager
def reference_is_a_copy(model: nn.Module) -> Iterator[None]:
    """Let TRL's trainer, within the context, take a copy of the model as the reference of a KL.

    TRL loads the reference from the folder that the model's configuration names, which is the base where an adapter
    was merged or loaded, or where a script changed weights: its KL would not be 0 at the start. Weights that ZeRO-3
    has partitioned cannot be copied, and are loaded as in TRL.
    """
    original = grpo_trainer.create_model_from_path
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        grpo_trainer.create_model_from_path = lambda *_, **__: copy.deepcopy(model)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


@contextmanager
def without_reference_model(args: Any) -> Iterator[None]:
    """Set `args.beta` to 0 within the context: otherwise TRL loads a reference model, beside the mixture's anchor."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = beta


def install_scoring_forward(model: nn.Module, score: Callable[..., Any]) -> None:
    """Answer TRL's `model(…, labels=labels, fused_lm_head=True)` by `score(labels=labels, …)`.

    TRL replaces the model's forward by one that reads `base_model` and `get_output_embeddings()` and would score
    a mixture as its policy alone. The scoring stays a forward of the model, so that DDP and FSDP see it.
    """

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return type(self).forward(self, *args, labels=labels, **kwargs)
        return score(labels=labels, **kwargs)

    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # `generate` checks arguments against it
    model.forward = MethodType(forward, model)
