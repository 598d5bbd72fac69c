"""`logitmix lm-eval`: the command line of lm-evaluation-harness, which loads a mixture like any other model."""

import importlib
import sys
from collections.abc import Sequence

from logitmix.cli.options.help import asks_for_help


def main(argv: Sequence[str]) -> None:
    """Run `lm_eval` with these flags, once mixtures are registered with transformers, and it scores their prompts."""
    try:
        cli_evaluate = importlib.import_module("lm_eval.__main__").cli_evaluate
        if not asks_for_help(argv):
            importlib.import_module("logitmix.mixture.modeling")
            importlib.import_module("logitmix.evaluation.lm_eval_patches").score_with_member_prompts()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-evaluation-harness cannot be imported ({error}); pip install 'lm-eval>=0.4.11'"
        ) from error
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()
