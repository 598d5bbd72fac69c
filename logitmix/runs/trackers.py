"""Trackers of `--report_to`: check that they can be used, and log evaluations to them."""

from collections.abc import Mapping, Sequence

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks


def validate_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError` for a tracker that is unknown or not installed. Call it before loading a model."""
    for name in names:
        try:
            for tracker in get_reporting_integration_callbacks(name):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to is {name!r}, which cannot be used here: {error} Or leave out --report_to; metrics.jsonl "
                "is written in any case"
            ) from error


def log_to_trackers(trainer: Trainer, rates: Mapping[str, Mapping[str, float]]) -> None:
    """Log an evaluation's rates, by member, to the trackers, under names such as `eval/mixture_answer`.

    `Trainer.log` would not do: TRL's resets the running means of the training metrics, and the rates would also be
    written to metrics.jsonl.
    """
    logs = {
        f"eval_{name}_{rate}": value for name, values in rates.items() for rate, value in values.items() if rate != "n"
    }
    trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=logs)
