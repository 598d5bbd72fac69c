"""Sets the mixture's alpha between outer steps, and saves and restores it.

An outer step is one round of rollouts and the updates that use it. alpha changes only between outer steps, since the
ratio of eq. 5 compares two mixtures at the same alpha.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from logitmix.training.alpha.controllers import (
    KL_BUDGET,
    SCHEDULES,
    adaptive,
    cosine,
    linear,
    parse_points,
    piecewise,
    standardised_gain,
    validation_weighted,
)
from logitmix.training.alpha.kl_budget import alpha_within_budget
from logitmix.training.alpha.validation import FreshQuestions, HeldOut, Rows, validate
from logitmix.training.config import LogitMixGRPOConfig, updates_per_outer_step

STATE = "alpha"  # in the checkpoint's trainer_state.json, under stateful_callbacks


class AlphaControl(TrainerCallback):
    """Sets the mixture's alpha after each outer step, and logs the validation that it was computed from.

    A resumed run takes alpha from the checkpoint's trainer state; the validation questions depend on the step only.
    transformers restores a stateful callback by constructing it again, which is impossible for one that needs its
    trainer, so this one reads and writes its entry of the trainer state itself.
    """

    def __init__(self, trainer: GRPOTrainer, questions: HeldOut | FreshQuestions | None) -> None:
        self.trainer, self.questions = trainer, questions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config = self.trainer.args
        if config.alpha_controller in SCHEDULES:
            done = state.global_step - state.global_step % updates_per_outer_step(config)
            self._set(state, scheduled_alpha(config, done, state.max_steps))
        elif STATE in state.stateful_callbacks:
            self._set(state, state.stateful_callbacks[STATE]["attributes"]["alpha"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if not trainer.outer_step_is_complete:
            return
        if self.questions is not None:
            done = state.global_step // updates_per_outer_step(trainer.args)
            self._set(state, self._validated_alpha(self.questions.after(done - 1)))
        elif trainer.args.alpha_controller == KL_BUDGET:
            self._set(state, alpha_within_budget(trainer, trainer.monitor.last_tokens, trainer.args.kl_budget))
        else:
            self._set(state, scheduled_alpha(trainer.args, state.global_step, state.max_steps))

    def _validated_alpha(self, rows: Rows) -> float:
        trainer, args, alpha = self.trainer, self.trainer.args, self.trainer.model.alpha
        with trainer.monitor.clock.timed("validation"):
            counts = validate(trainer, rows, alpha, with_anchor=args.alpha_controller == "validation_weighted")
        values = {
            "validation/policy_accuracy": counts.policy / counts.n,
            "validation/mixture_accuracy": counts.mixture / counts.n,
            "validation/s1": counts.forgetting,
            "validation/s2": counts.gain,
        }
        if counts.anchor is not None:
            alpha = validation_weighted(alpha, counts)
            values["validation/anchor_accuracy"] = counts.anchor / counts.n
        else:
            alpha = adaptive(counts, args.adaptive_offset, args.adaptive_scale)
            values["validation/s3"] = standardised_gain(counts, args.adaptive_offset, args.adaptive_scale)
        for name, value in values.items():
            trainer.step_metrics[name].append(value)
        return alpha

    def _set(self, state: TrainerState, alpha: float) -> None:
        self.trainer.model.alpha = alpha
        state.stateful_callbacks[STATE] = {"args": {}, "attributes": {"alpha": alpha}}


def scheduled_alpha(args: LogitMixGRPOConfig, step: int, max_steps: int) -> float:
    """alpha of the outer step that starts after `step` updates, under one of `SCHEDULES`."""
    assert args.alpha is not None
    if args.alpha_controller == "piecewise":
        assert args.alpha_points is not None
        return piecewise(step, [(0, args.alpha), *parse_points(args.alpha_points)])
    assert args.alpha_end is not None
    schedule = {"linear": linear, "cosine": cosine}[args.alpha_controller]
    return schedule(step / max_steps, args.alpha, args.alpha_end)
