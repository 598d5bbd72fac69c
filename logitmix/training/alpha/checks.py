"""Checks of a controller of alpha against the other options, the model and the data."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from logitmix.mixture.mixing import weights_to_alpha
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.alpha.controllers import KL_BUDGET, VALIDATING, Counts, adaptive, parse_points
from logitmix.training.config import LogitMixGRPOConfig


def validate_alpha_controller(
    args: LogitMixGRPOConfig, model: PreTrainedModel, validation_dataset: Dataset | None, kwargs: dict[str, Any]
) -> None:
    """Raise `ValueError` where `args.alpha_controller` does not fit the other options or the model."""
    controller = args.alpha_controller
    _validate_given(args)
    if validation_dataset is not None and controller not in VALIDATING:
        raise ValueError(f"there is a validation_dataset, but alpha_controller {controller!r} validates nothing")
    if controller == "fixed":
        return
    if not isinstance(model, LogitMixForCausalLM):
        raise ValueError(f"alpha_controller is {controller!r}, but there is no anchor to weigh; set anchor")
    weights = model.config.weights
    if weights_to_alpha(weights) is None:
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
    _validate_values(args, model.config.scheme)
    if controller == KL_BUDGET and model.config.cut is not None:
        raise ValueError(
            f"alpha_controller 'kl_budget' computes the KL of a mixture of all tokens, but this one has plausibility "
            f"{model.config.plausibility}, which rules out tokens; use config.set_plausibility(None)"
        )
    if controller not in VALIDATING:
        return
    if args.validation_size < 1:
        raise ValueError(f"validation_size is {args.validation_size}, but must be at least 1")
    for option in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(option) is not None:
            raise ValueError(
                f"{option} cannot be used with alpha_controller {controller!r}, whose validation decodes one response "
                "per question without it"
            )
    if controller == "adaptive":
        _validate_adaptive_scale(args)


def _validate_given(args: LogitMixGRPOConfig) -> None:
    """Raise `ValueError` for an option of another controller, and where the controller lacks its own."""
    for option, value, readers in (
        ("alpha_end", args.alpha_end, ("linear", "cosine")),
        ("alpha_points", args.alpha_points, ("piecewise",)),
        ("kl_budget", args.kl_budget, (KL_BUDGET,)),
    ):
        if (value is not None) != (args.alpha_controller in readers):
            raise ValueError(
                f"alpha_controller is {args.alpha_controller!r} and {option} is {value}; {option} goes with "
                f"{' and '.join(readers)}, and is required there"
            )


def _validate_values(args: LogitMixGRPOConfig, scheme: str) -> None:
    """Raise `ValueError` for an end, points or a budget outside their ranges, and for a budget in another scheme."""
    if args.alpha_end is not None and not 0 <= args.alpha_end < 1:
        raise ValueError(f"alpha_end is {args.alpha_end}; training needs 0 <= alpha < 1")
    if args.kl_budget is not None and not args.kl_budget > 0:
        raise ValueError(f"kl_budget is {args.kl_budget}, but must be above 0; only the anchor itself has no KL")
    if args.alpha_controller == KL_BUDGET and scheme != "logit":
        raise ValueError(
            f"alpha_controller 'kl_budget' needs scheme 'logit', whose KL to the anchor falls with alpha; scheme is "
            f"{scheme!r}"
        )
    if args.alpha_points is not None:
        parse_points(args.alpha_points)


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
