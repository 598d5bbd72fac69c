"""`logitmix eval`: accuracy of policy, anchor and mixture on the same test problems, greedy or sampled."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments, SamplingArguments
from logitmix.cli.options.model import MixtureArguments, ModelArguments, load_model
from logitmix.cli.options.parser import flatten, parse
from logitmix.runs.console import console


@dataclass
class EvalOptions:
    problems: TestProblemArguments
    model: ModelArguments
    mixture: MixtureArguments
    sampling: SamplingArguments
    decoding: DecodingArguments


def main(argv: Sequence[str]) -> None:
    description = "Evaluate policy, anchor and mixture, or a single model, on the same test problems."
    run(parse("eval", description, EvalOptions, argv))


def run(options: EvalOptions) -> None:
    from logitmix.evaluation.decode import get_alphas, make_decoder
    from logitmix.evaluation.metrics import validate_num_samples
    from logitmix.evaluation.report.tables import print_evaluation
    from logitmix.evaluation.requests import make_batches, make_requests
    from logitmix.evaluation.responses import open_responses
    from logitmix.mixture.loading import require_tokenizer

    model_args, sampling, args = options.model, options.sampling, options.decoding
    validate_num_samples(sampling.num_samples, sampling.temperature)
    data_args, task = options.problems.resolve_task(model_args.model_name_or_path, options.mixture.anchor)
    problems = task.problems("test", options.problems.eval_limit)
    model = load_model(model_args, options.mixture)
    tokenizer = require_tokenizer(model_args.model_name_or_path)
    decode = make_decoder(
        model, tokenizer, task, problems, args.max_new_tokens, sampling.temperature, sampling.seed, args.decoding
    )
    requests = make_requests(get_alphas(model), len(problems), sampling.num_samples)
    batches = make_batches(requests, args.batch_size)
    arguments = {"command": "eval"}
    arguments |= flatten(options.problems, data_args, model_args, options.mixture, sampling, args)
    responses = open_responses(args.output_dir, arguments, Counter(request.name for request in requests))
    responses.add(f"eval on {task.name}", batches, decode)
    if responses.path is not None:
        console.print(f"Responses are in {responses.path}.", soft_wrap=True)
    decoding = "greedy"
    if sampling.temperature > 0:
        decoding = f"{sampling.num_samples} samples each at temperature {sampling.temperature:g}"
    print_evaluation(f"{task.name}, {len(problems)} test problems, {decoding}", responses.rows)
