"""Time of a product of few rows by a float32 weight on a CPU: `F.linear`, oneDNN, and the ratio of the two.

python benchmarks/few_rows.py [--width 576] [--vocab_size 49152] [--threads 2]
"""

import argparse
import time
from collections.abc import Callable

import torch

from logitmix.mixture.torch_patches import onednn_linear


def milliseconds(product: Callable[[], torch.Tensor]) -> float:
    """The least time of one product in several rounds."""
    rounds = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(5):
            product()
        rounds.append((time.perf_counter() - start) / 5)
    return 1000 * min(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocab_size", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weight = torch.randn(args.vocab_size, args.width)
    for rows in (1, 2, 4, 8, 16, 32):
        x = torch.randn(1, rows, args.width)
        linear = milliseconds(lambda x=x: torch.nn.functional.linear(x, weight))
        onednn = milliseconds(lambda x=x: onednn_linear(x, weight))
        print(f"{rows} rows: F.linear {linear:.1f} ms, oneDNN {onednn:.1f} ms: {linear / onednn:.2f} times as fast")


if __name__ == "__main__":
    main()
