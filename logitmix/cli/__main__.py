"""`logitmix VERB`: finds the verb's module, runs it, and turns expected errors into one line and a status."""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version

from logitmix.tasks.names import unknown_name

VERBS = {
    "quickstart": ("logitmix.cli.quickstart", "train a tiny mixture from nothing, on a CPU, without downloads"),
    "fetch-example": ("logitmix.cli.fetch_example", "fetch a small real language model, as a folder"),
    "sft": ("logitmix.cli.sft", "fine-tune an anchor on a task's demonstrations"),
    "train": ("logitmix.cli.train", "train the mixture of a policy and a frozen anchor with GRPO"),
    "distill": ("logitmix.cli.distill", "make one ordinary model out of a mixture"),
    "serve": ("logitmix.cli.serve", "serve a mixture over an OpenAI-compatible API, with vLLM or transformers"),
    "export": ("logitmix.cli.export", "write one member of a mixture as an ordinary checkpoint"),
    "check-task": ("logitmix.cli.check_task", "show a task's splits and check its gold answers"),
    "verify": ("logitmix.cli.verify", "compare two answers, and show how each is read"),
    "check-quantization": ("logitmix.cli.check_quantization", "show what quantising an anchor changes"),
    "recipes": ("logitmix.cli.recipes", "list the recipes: settings of every run of the paper, by name"),
    "eval": ("logitmix.cli.eval", "evaluate policy, anchor and mixture on the same problems"),
    "sweep": ("logitmix.cli.sweep", "evaluate a pair at every alpha, mixed in logits, probabilities and weights"),
    "realign": ("logitmix.cli.realign", "predict rates and divergences at other alphas, without decoding them"),
    "inspect": ("logitmix.cli.inspect", "show a response token by token, and which member chose each token"),
    "report": ("logitmix.cli.report", "plot the curves of training runs"),
    "reproduce": ("logitmix.cli.reproduce", "run every arm of the paper and check its claims"),
    "complement": ("logitmix.cli.complement", "compare two policies: what each gets right, together and alone"),
    "lm-eval": ("logitmix.cli.lm_eval", "run lm-evaluation-harness, with support for mixtures"),
}

# Read when the libraries are imported, which a command does only once it needs them; their progress bars would
# interleave with those of `runs.console`
LIBRARY_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' as well
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

SERVERS = ("serve", "lm-eval")  # print what they do themselves

USAGE = "usage: logitmix VERB [flags]      (`logitmix VERB --help` lists the flags of a verb)\n\n" + "".join(
    f"  {verb:<20}{description}\n" for verb, (_, description) in VERBS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status: 0, one of the verb's own, 2 after an error, or 130 after Ctrl-C.

    For wrong input, a full disk, and an option whose package is not installed, it prints one error line.
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
        return _fail(str(unknown_name("command", verb, VERBS)))
    from logitmix.runs.console import working  # not for --help

    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with nullcontext() if verb in SERVERS or not _is_first_process() else working(f"logitmix {verb}"):
            return importlib.import_module(VERBS[verb][0]).main(flags) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch here would slow down --help
            raise
        return _fail(f"{error} Process fewer sequences at a time: logitmix {verb} --help lists the batch sizes")
    except KeyboardInterrupt:
        print("logitmix: interrupted", file=sys.stderr)
        return 130


def _is_first_process() -> bool:
    """Whether this process prints: the only one, or the first that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str) -> int:
    print(f"logitmix: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
