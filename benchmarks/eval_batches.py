"""Greedy decoding of policy, anchor and mixture, in one batch per alpha or in one batch for all (docs/analysis.md).

    python benchmarks/eval_batches.py runs/quickstart/fixed_mixing [--rounds 5]

The model is a checkpoint of a mixture trained on arithmetic. The two ways alternate on one thread; the table shows the
best round of each.
"""

import argparse
import time

import torch

from logitmix.evaluation.decode import get_alphas, make_decoder
from logitmix.evaluation.requests import Request, make_requests
from logitmix.mixture.loading import load_member, require_tokenizer
from logitmix.tasks import Arithmetic

PROBLEMS = (8, 20, 64, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, task = load_member(args.mixture).eval(), require_tokenizer(args.mixture), Arithmetic()
    print("| problems | one alpha a batch | all in one batch |\n|---|---|---|")
    for count in PROBLEMS:
        decode = make_decoder(model, tokenizer, task, task.problems("test", count))
        requests = list(make_requests(get_alphas(model), count))
        by_alpha: dict[str, list[Request]] = {}
        for request in requests:
            by_alpha.setdefault(request.name, []).append(request)
        ways = [list(by_alpha.values()), [requests]]
        list(decode([requests[:1]]))  # warm up
        seconds: list[list[float]] = [[], []]
        for _ in range(args.rounds):
            for batches, measured in zip(ways, seconds, strict=True):
                start = time.perf_counter()
                assert sum(map(len, decode(batches))) == len(requests)
                measured.append(time.perf_counter() - start)
        print(f"| {count} | {min(seconds[0]):.2f} | {min(seconds[1]):.2f} |")


if __name__ == "__main__":
    main()
