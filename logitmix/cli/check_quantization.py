"""`logitmix check-quantization MODEL`: what `--anchor_quantization` would change in it, on a task's questions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.model import Dtype, LoadingArguments, find_model
from logitmix.cli.options.parser import Validated, parse
from logitmix.cli.options.validation import validate_at_least


@dataclass(kw_only=True)
class QuantizationArguments(LoadingArguments):
    """Model and quantisation"""

    model_name_or_path: str = field(metadata={"help": "Folder or hub id of the model as it is, such as an anchor."})
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "int8, int4, bitsandbytes-8bit, bitsandbytes-4bit, or a quantization_config of transformers as "
            "JSON."
        },
    )
    quantized: str | None = field(
        default=None, metadata={"help": "Or the folder or hub id of a checkpoint that is quantised already."}
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the weights; auto: the checkpoint's own."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response that is compared, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Number of responses at a time."})

    def __post_init__(self) -> None:
        self.model_name_or_path = find_model(self.model_name_or_path)
        validate_at_least(self, max_new_tokens=1, batch_size=1)
        if (self.quantization is None) == (self.quantized is None):
            raise ValueError("give one of --quantization (how to quantise the model) and --quantized (a checkpoint)")


@dataclass
class QuantizationOptions(Validated):
    model: QuantizationArguments
    data: TestProblemArguments


def main(argv: Sequence[str]) -> None:
    description = (
        "Quantise a model, and compare its distributions with the original's at each token of the original's greedy "
        "responses to a task's questions."
    )
    positional = ("model_name_or_path", "MODEL")
    run(parse("check-quantization", description, QuantizationOptions, argv, positional=positional))


def run(options: QuantizationOptions) -> None:
    from accelerate import PartialState

    from logitmix.evaluation.quantization import compare_quantized
    from logitmix.mixture.loading import load_member, require_tokenizer, validate_same_tokenizer
    from logitmix.mixture.quantization import as_quantization, loading_kwargs, validate_can_be_quantized

    args, source = options.model, options.model.model_name_or_path
    quantization: dict = {}
    if args.quantization is not None:
        quantization = loading_kwargs(as_quantization(args.quantization))
        validate_can_be_quantized("the model", source)
    task = options.data.resolve(source).load()
    problems = task.problems("test", options.data.eval_limit)
    tokenizer = require_tokenizer(source)
    if args.quantized is not None:
        validate_same_tokenizer([tokenizer, require_tokenizer(args.quantized)])
    original, quantized = (
        load_member(path, **(args.init_kwargs | kwargs)).to(PartialState().device).eval()
        for path, kwargs in ((source, {}), (args.quantized or source, quantization))
    )
    change = compare_quantized(original, quantized, tokenizer, task, problems, args.max_new_tokens, args.batch_size)
    name = args.quantized or args.quantization
    table = Table("", "", title=f"{source}, and {name}", title_justify="left", show_header=False)
    table.add_row("questions", f"{len(problems):,} of {task.name}, {change.tokens:,} tokens of greedy responses")
    table.add_row("KL(original ‖ quantised)", f"{change.kl:.4g} nats a token, at most {change.worst:.3g}")
    table.add_row("same most probable token", f"{change.agreement:.1%}")
    table.add_row("weights", " -> ".join(f"{size / 1e9:.3g} GB" for size in change.sizes))
    Console().print(table)
