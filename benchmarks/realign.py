"""The rates that `logitmix realign` predicts, beside those of rollouts sampled at each alpha.

    python benchmarks/realign.py --model_name_or_path BASE --anchor SFT --alphas 0.3 0.4 0.6 0.7 [flags of realign]

Both are at temperature 1 and of the same problems. Intervals are of 95 % and treat rollouts as independent. A
prediction agrees if it is within 2.8 standard errors of the sampled rate (99.5 %), the errors of both added.
"""

import sys
from dataclasses import replace
from datetime import date
from importlib.metadata import version

from logitmix.cli.options.parser import parse
from logitmix.cli.realign import DEFAULT_ALPHA, RealignOptions, load_decoder
from logitmix.evaluation.metrics import estimate
from logitmix.evaluation.realignment import predict, sample_rollouts
from logitmix.evaluation.statistics import Estimate
from logitmix.runs.provenance import processor

AGREES = 2.8


def cell(rate: Estimate) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def agrees(predicted: Estimate, sampled: Estimate) -> bool:
    errors = [(rate.high - rate.low) / 2 / 1.96 for rate in (predicted, sampled)]
    return abs(predicted.value - sampled.value) <= AGREES * (errors[0] ** 2 + errors[1] ** 2) ** 0.5


def main() -> None:
    options = parse("realign", __doc__, RealignOptions, sys.argv[1:])
    args = options.realignment
    decoder = load_decoder(options)
    alpha = DEFAULT_ALPHA if args.alpha is None else args.alpha
    rollouts = sample_rollouts(decoder, alpha, args.num_samples, args.batch_size)
    predictions, _ = predict(decoder.model, rollouts, args.alphas)
    print(f"{date.today()}, {processor()['name']}, torch {version('torch')}, transformers {version('transformers')}.")
    print(f"Predicted from {len(rollouts.responses)} rollouts at alpha {alpha:g}.\n")
    print("| alpha | effective | covered % | format %, predicted | sampled | answer %, predicted | sampled | agree |")
    print("|---|---|---|---|---|---|---|---|")
    other = replace(decoder, seed=args.seed + 1)
    for prediction in predictions:
        sampled = sample_rollouts(other, prediction.alpha, args.num_samples, args.batch_size).responses
        cells = [f"{prediction.alpha:g}", f"{prediction.effective:.0f}", f"{100 * prediction.covered:.0f}"]
        verdicts: list[bool] = []
        for predicted, outcome in ((prediction.format, "format_ok"), (prediction.answer, "answer_ok")):
            rate = estimate(sampled, outcome)
            cells += ["too few" if predicted is None else cell(predicted), cell(rate)]
            verdicts += [] if predicted is None else [agrees(predicted, rate)]
        print("| " + " | ".join([*cells, "–" if not verdicts else "yes" if all(verdicts) else "**no**"]) + " |")


if __name__ == "__main__":
    main()
