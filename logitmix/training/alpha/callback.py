"""Sets the mixture's alpha between outer steps, and saves and restores it.

An outer step is one round of rollouts and the updates that use it. alpha changes only between outer steps, since the
ratio of eq. 5 compares two mixtures at the same alpha.
"""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.controllers import (
    KL_BUDGET,
    SCHEDULES,
    VALIDATING,
    Counts,
    adaptive,
    cosine,
    linear,
    parse_points,
    piecewise,
    standardised_gain,
    validation_weighted,
)
from logitmix.training.alpha.kl_budget import alpha_within_budget
from logitmix.training.alpha.validation import FreshQuestions, HeldOut, Rows, updates_per_outer_step, validate
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.reanchor import Reanchor, prepare_reanchor

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


def outer_step_callbacks(trainer: GRPOTrainer, questions: HeldOut | FreshQuestions | None) -> list[TrainerCallback]:
    """What sets anchor and alpha between outer steps: the anchor first, since alpha may be validated with it.

    Raises `ValueError` for an anchor that cannot be replaced.
    """
    callbacks: list[TrainerCallback] = []
    if trainer.args.reanchor_steps is not None:
        prepare_reanchor(trainer)
        callbacks.append(Reanchor(trainer))
    if trainer.args.alpha_controller != "fixed":
        callbacks.append(AlphaControl(trainer, questions))
    return callbacks


def scheduled_alpha(args: LogitMixGRPOConfig, step: int, max_steps: int) -> float:
    """alpha of the outer step that starts after `step` updates, under one of `SCHEDULES`."""
    assert args.alpha is not None
    if args.alpha_controller == "piecewise":
        assert args.alpha_points is not None
        return piecewise(step, [(0, args.alpha), *parse_points(args.alpha_points)])
    assert args.alpha_end is not None
    schedule = {"linear": linear, "cosine": cosine}[args.alpha_controller]
    return schedule(step / max_steps, args.alpha, args.alpha_end)


def validate_alpha_controller(
    args: LogitMixGRPOConfig, model: PreTrainedModel, validation_dataset: Dataset | None, kwargs: dict[str, Any]
) -> None:
    """Raise `ValueError` where `args.alpha_controller` does not fit the other options or the model."""
    controller = args.alpha_controller
    for option, value, readers in (
        ("alpha_end", args.alpha_end, ("linear", "cosine")),
        ("alpha_points", args.alpha_points, ("piecewise",)),
        ("kl_budget", args.kl_budget, (KL_BUDGET,)),
    ):
        if (value is not None) != (controller in readers):
            raise ValueError(
                f"alpha_controller is {controller!r} and {option} is {value}; {option} goes with "
                f"{' and '.join(readers)}, and is required there"
            )
    if validation_dataset is not None and controller not in VALIDATING:
        raise ValueError(f"there is a validation_dataset, but alpha_controller {controller!r} validates nothing")
    if controller == "fixed":
        return
    if not isinstance(model, LogitMixForCausalLM):
        raise ValueError(f"alpha_controller is {controller!r}, but there is no anchor to weigh; set anchor")
    weights = model.config.weights
    if len(weights) != 2 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"alpha_controller {controller!r} needs a policy and one anchor whose weights sum to 1; the mixture has "
            f"weights {weights}, so only 'fixed' can be used"
        )
    micro_batches, update = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if micro_batches % update:
        raise ValueError(
            f"alpha_controller {controller!r} needs whole updates in an outer step, but steps_per_generation * "
            f"num_iterations is {micro_batches} and gradient_accumulation_steps {update}; set steps_per_generation "
            "to a multiple of it (rollout_batch_size limits the memory)"
        )
    if args.alpha_end is not None and not 0 <= args.alpha_end < 1:
        raise ValueError(f"alpha_end is {args.alpha_end}; training needs 0 <= alpha < 1")
    if args.kl_budget is not None and not args.kl_budget > 0:
        raise ValueError(f"kl_budget is {args.kl_budget}, but must be above 0; only the anchor itself has no KL")
    if controller == KL_BUDGET and model.config.scheme != "logit":
        raise ValueError(
            f"alpha_controller 'kl_budget' needs scheme 'logit', whose KL to the anchor falls with alpha; scheme is "
            f"{model.config.scheme!r}"
        )
    if args.alpha_points is not None:
        parse_points(args.alpha_points)
    if controller in VALIDATING:
        if args.validation_size < 1:
            raise ValueError(f"validation_size is {args.validation_size}, but must be at least 1")
        for option in ("tools", "environment_factory", "rollout_func"):
            if kwargs.get(option) is not None:
                raise ValueError(
                    f"{option} cannot be used with alpha_controller {controller!r}, whose validation decodes one "
                    "response per question without it"
                )
    if controller == "adaptive":
        _validate_adaptive_scale(args)


def _validate_adaptive_scale(args: LogitMixGRPOConfig) -> None:
    if not args.adaptive_scale > 0:
        raise ValueError(
            f"adaptive_scale is {args.adaptive_scale}, but must be above 0, so that alpha rises with the gain"
        )
    n = args.validation_size
    if not adaptive(Counts(n, 0, n, 0, n), args.adaptive_offset, args.adaptive_scale) < 1:
        raise ValueError(
            f"with adaptive_scale {args.adaptive_scale}, adaptive_offset {args.adaptive_offset} and validation_size "
            f"{n} alpha can reach 1, where the policy has no gradient; raise adaptive_scale"
        )
