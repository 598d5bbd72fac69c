"""`logitmix inspect "QUESTION"`: the mixture's response token by token, and which members chose each token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.data import CheckpointDataArguments
from logitmix.cli.options.evaluation import DECODING_HELP, Decoding
from logitmix.cli.options.model import MixtureArguments, ModelArguments, load_model, require_mixture
from logitmix.cli.options.parser import parse
from logitmix.runs.console import console


@dataclass
class InspectArguments:
    """Inspection"""

    question: str = field(metadata={"help": "A question in the form of the task's problems."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest response, in tokens."})
    decoding: Decoding = field(default="auto", metadata={"help": DECODING_HELP})
    output_file: str = field(
        default="inspect.html", metadata={"help": "HTML page to write; an existing file is overwritten."}
    )


@dataclass
class InspectOptions:
    inspection: InspectArguments
    data: CheckpointDataArguments
    model: ModelArguments
    mixture: MixtureArguments


def main(argv: Sequence[str]) -> None:
    if argv and not argv[0].startswith("--"):
        argv = [f"--question={argv[0]}", *argv[1:]]  # it may begin with a minus
    description = (
        "Decode the mixture's greedy response to a question, and show for each token what each member would have "
        "written in its place."
    )
    run(parse("inspect", description, InspectOptions, argv, positional=("question", '"QUESTION"')))


def run(options: InspectOptions) -> None:
    from logitmix.evaluation.inspect import inspect
    from logitmix.evaluation.report.inspection_table import print_inspection
    from logitmix.evaluation.report.pages import inspection_page
    from logitmix.mixture.loading import require_tokenizer
    from logitmix.mixture.tokenizers import keep_tags

    args, model_args = options.inspection, options.model
    if not args.question.strip():
        raise ValueError('the question is empty; ask one, as in logitmix inspect "7+8-9+4"')
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {args.max_new_tokens}, but must be at least 1")
    path = Path(args.output_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output_file {path} cannot be written; give a file in a folder that exists")
    source, anchor = model_args.model_name_or_path, options.mixture.anchor
    task = options.data.resolve(source, anchor).load()
    template = task.template
    model = require_mixture(load_model(model_args, options.mixture), source)
    tokenizer = require_tokenizer(source)
    keep_tags(tokenizer, template)
    inspection = inspect(
        model, tokenizer, template.prompt(args.question), args.max_new_tokens, template.stop, args.decoding,
        task.chat_template_kwargs,
    )  # fmt: skip
    print_inspection(inspection)
    names = [source, anchor] if anchor else [f"{source} ({name})" for name in model.config.display_names]
    path.write_text(inspection_page(inspection, args.question, *names), encoding="utf-8")
    console.print(f"The page is {path}.", soft_wrap=True)
