"""`logitmix inspect "QUESTION"`: the mixture's response token by token, and which member wrote each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.data import CheckpointDataArguments
from logitmix.cli.options.mixture import MixtureArguments, open_mixture, open_tokenizer
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import parse
from logitmix.evaluation.inspect import inspect
from logitmix.evaluation.report.pages import inspection_page
from logitmix.evaluation.report.tables import print_inspection
from logitmix.runs.folder import console


@dataclass
class InspectArguments:
    """The question, and the page to write."""

    question: str = field(metadata={"help": "The question, as in a problem of the task."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest response in tokens."})
    output_file: str = field(default="inspect.html", metadata={"help": "The page to write; it is overwritten."})


def main(argv: Sequence[str]) -> None:
    if argv and not argv[0].startswith("--"):
        argv = [f"--question={argv[0]}", *argv[1:]]  # the question may begin with a minus
    args, asked, model_args, mixture_args = parse(
        'logitmix inspect "QUESTION"',
        "The mixture's response token by token, and which member wrote each.",
        (InspectArguments, CheckpointDataArguments, ModelArguments, MixtureArguments),
        argv,
    )
    if not args.question.strip():
        raise ValueError('the question is empty; ask one, as in logitmix inspect "7+8-9+4"')
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {args.max_new_tokens}, but must be at least 1")
    path = Path(args.output_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output_file {path} cannot be written; give a file in a folder that exists")
    template = asked.resolve(model_args.model_name_or_path, mixture_args.anchor).load().template
    model = open_mixture(model_args, mixture_args)
    tokenizer = open_tokenizer(model_args)
    inspection = inspect(model, tokenizer, template.prompt(args.question), args.max_new_tokens, template.stop)
    print_inspection(inspection)
    policy = model_args.model_name_or_path if mixture_args.anchor else f"{model_args.model_name_or_path} (policy)"
    anchor = mixture_args.anchor or f"{model_args.model_name_or_path} (anchor)"
    path.write_text(inspection_page(inspection, args.question, policy, anchor), encoding="utf-8")
    console.print(f"The page is {path}.", soft_wrap=True)
