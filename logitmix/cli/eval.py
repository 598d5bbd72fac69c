"""`logitmix eval`: policy, anchor and mixture on the same test problems, greedy or sampled."""

from collections.abc import Sequence

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments, SamplingArguments
from logitmix.cli.options.mixture import MixtureArguments, open_model, open_tokenizer
from logitmix.cli.options.model import ModelArguments
from logitmix.cli.options.parser import parse
from logitmix.evaluation.decode import decoder, in_batches, members_of, requests_for
from logitmix.evaluation.metrics import check_pass_at
from logitmix.evaluation.report.tables import print_evaluation
from logitmix.evaluation.responses import open_responses
from logitmix.runs.folder import console


def main(argv: Sequence[str]) -> None:
    asked, model_args, mixture_args, sampling, args = parse(
        "logitmix eval",
        "Accuracy of policy, anchor and mixture on the same test problems, greedy or sampled.",
        (TestProblemArguments, ModelArguments, MixtureArguments, SamplingArguments, DecodingArguments),
        argv,
    )
    check_pass_at(sampling.num_samples, sampling.temperature)
    data_args = asked.resolve(model_args.model_name_or_path, mixture_args.anchor)
    task = data_args.load()
    problems = task.problems("test", asked.eval_limit)
    model = open_model(model_args, mixture_args)
    tokenizer = open_tokenizer(model_args)
    decode = decoder(model, tokenizer, task, problems, args.max_new_tokens, sampling.temperature, sampling.seed)
    batches = in_batches(requests_for(members_of(model), len(problems), sampling.num_samples), args.batch_size)
    given = [vars(group) for group in (asked, data_args, model_args, mixture_args, sampling, args)]
    arguments = {"command": "eval"} | {key: value for group in given for key, value in group.items()}
    responses = open_responses(args.output_dir, arguments)
    responses.add(f"eval on {task.name}", batches, decode)
    if responses.path is not None:
        console.print(f"Responses are in {responses.path}.", soft_wrap=True)
    how = "greedy"
    if sampling.temperature > 0:
        how = f"{sampling.num_samples} samples each at temperature {sampling.temperature:g}"
    print_evaluation(f"{task.name}, {len(problems)} test problems, {how}", responses.rows)
