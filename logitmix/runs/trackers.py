"""The trackers of `--report_to`: whether they are there, and what they get beside the trainer's own log."""

from collections.abc import Mapping, Sequence

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ValueError`, before a model is loaded, for a tracker that is unknown or not installed."""
    for name in names:
        try:
            for tracker in get_reporting_integration_callbacks(name):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"report_to is {name!r}, which cannot be used here: {error} Or leave it out: metrics.jsonl is written "
                "in any case."
            ) from error


def tell_trackers(trainer: Trainer, rates: Mapping[str, Mapping[str, float]]) -> None:
    """Give an evaluation's rates, by name of the member, to the trackers, where they stand as `eval/mixture_answer`.

    Not by `Trainer.log`: TRL's ends the means of the training metrics under way, and they would go to metrics.jsonl.
    """
    logs = {
        f"eval_{name}_{rate}": value for name, values in rates.items() for rate, value in values.items() if rate != "n"
    }
    trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, trackers):
            callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=logs)
