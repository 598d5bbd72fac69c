"""What changes between outer steps, rounds of rollouts and the updates that use them: the anchor, and alpha."""

from transformers import TrainerCallback
from trl import GRPOTrainer

from logitmix.training.alpha.callback import AlphaControl
from logitmix.training.alpha.validation import FreshQuestions, HeldOut
from logitmix.training.reanchor import Reanchor, prepare_reanchor


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
