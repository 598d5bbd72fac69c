"""`logitmix eval`: greedy accuracy of policy, anchor and mixture on the same test problems."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState

from logitmix.commands.arguments import ModelArguments, TaskArguments, parse
from logitmix.commands.runs import append_jsonl, console, progress_bar
from logitmix.evaluation.decode import greedy_responses, members_of
from logitmix.evaluation.metrics import rates_by
from logitmix.members import load_member, require_tokenizer
from logitmix.mixing import Scheme
from logitmix.modeling import LogitMixForCausalLM
from logitmix.report import print_rates


@dataclass
class EvalArguments:
    """What is mixed, and how it is decoded."""

    anchor: str | None = field(default=None, metadata={"help": "Mix the model with this anchor."})
    alpha: float | None = field(default=None, metadata={"help": "Weight of the anchor; default the checkpoint's."})
    scheme: Scheme = field(default="logit", metadata={"help": "How --anchor is mixed."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest response; default 512 tokens, or what the context leaves."}
    )
    batch_size: int = field(default=64, metadata={"help": "Responses decoded at a time."})
    output_file: str | None = field(default=None, metadata={"help": "Write every response here, as JSON lines."})


def main(argv: Sequence[str]) -> None:
    task_args, model_args, args = parse(
        "logitmix eval",
        "Greedy accuracy of policy, anchor and mixture on the same test problems.",
        (TaskArguments, ModelArguments, EvalArguments),
        argv,
    )
    if args.output_file is not None and Path(args.output_file).exists():
        raise ValueError(f"{args.output_file} exists; choose another --output_file")
    task = task_args.load()
    problems = task.problems("test", task_args.eval_limit)
    if args.anchor is not None:
        model = LogitMixForCausalLM.from_members(
            model_args.model_name_or_path, args.anchor, args.alpha, scheme=args.scheme, **model_args.init_kwargs
        )
    else:
        model = load_member(model_args.model_name_or_path, **model_args.init_kwargs)
        if args.alpha is not None:
            if not isinstance(model, LogitMixForCausalLM):
                raise ValueError(f"alpha is {args.alpha}, but {model_args.model_name_or_path} is no mixture")
            model.alpha = args.alpha
    model.to(PartialState().device)
    tokenizer = require_tokenizer(model_args.model_name_or_path)
    alphas = members_of(model)
    with progress_bar() as bar:
        row = bar.add_task(f"eval on {task.name}", total=len(alphas) * len(problems), info="")
        responses = greedy_responses(
            model, tokenizer, task, problems, alphas, args.max_new_tokens, args.batch_size,
            progress=lambda n: bar.advance(row, n),
        )  # fmt: skip
    rows = [asdict(response) for response in responses]
    if args.output_file is not None:
        append_jsonl(Path(args.output_file), rows)
        console.print(f"Responses are in {args.output_file}.")
    print_rates(f"{task.name}, {len(problems)} test problems, greedy", rates_by(rows, "name"))
