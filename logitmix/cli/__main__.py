"""The command line: one thin command a verb."""

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version

VERBS = {
    "quickstart": ("logitmix.cli.quickstart", "from nothing to a report, on a laptop's CPU, without downloads"),
    "sft": ("logitmix.cli.sft", "make an anchor from a task's demonstrations"),
    "train": ("logitmix.cli.train", "GRPO of the mixture of a policy and a frozen anchor"),
    "serve": ("logitmix.cli.serve", "an OpenAI-compatible server of a mixture, by vLLM or transformers"),
    "export": ("logitmix.cli.export", "one member of a mixture as a checkpoint of its own"),
    "check-task": ("logitmix.cli.check_task", "a task's splits, and whether its golds accept themselves"),
    "recipes": ("logitmix.cli.recipes", "the names of the settings at hand: every run of the paper"),
    "eval": ("logitmix.cli.eval", "accuracy of policy, anchor and mixture on the same problems"),
    "sweep": ("logitmix.cli.sweep", "a pair at every alpha, mixed in logits, probabilities and weights"),
    "inspect": ("logitmix.cli.inspect", "a response token by token, and which member carried each"),
    "report": ("logitmix.cli.report", "curves of any number of training runs: figures, a page, a table"),
    "reproduce": ("logitmix.cli.reproduce", "every arm, table, figure and claim of the paper at one scale"),
    "complement": ("logitmix.cli.complement", "what two policies get right, together and alone"),
    "lm-eval": ("logitmix.cli.lm_eval", "lm-evaluation-harness, with mixtures among its --model hf"),
}

USAGE = "usage: logitmix VERB [flags]      (logitmix VERB --help for its flags)\n\n" + "".join(
    f"  {verb:<12}{what}\n" for verb, (_, what) in VERBS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; it may return a status of its own.

    Wrong input, and a package that an option needs and that is not installed, are answered by one sentence and exit
    status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"logitmix {version('logitmix')}")
        return 0
    verb, *flags = argv
    if verb not in VERBS:
        nearest = get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        return _fail(f"there is no command {verb!r}; did you mean {nearest!r}? The commands are {', '.join(VERBS)}")
    # to be set before transformers is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        importlib.import_module("logitmix.runs.folder").quiet_libraries()
        return importlib.import_module(VERBS[verb][0]).main(flags) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _fail(f"{error} Take fewer sequences at a time: logitmix {verb} --help lists the batch sizes")
    except KeyboardInterrupt:
        print("logitmix: interrupted", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"logitmix: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
