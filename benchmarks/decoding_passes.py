"""Passes a token of alternating decoding against the acceptance rate: a figure, with the curve 2 - a.

    python benchmarks/decoding_passes.py --policy FOLDER [--output docs/images/decoding_passes.svg]

Each point is a mixture of the policy and its copy with noise of some size, at one alpha. Passes and drafts are
counted, so the points do not depend on the machine's speed. The points are printed too.
"""

import argparse
import copy
import itertools
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM

from logitmix import LogitMixForCausalLM
from logitmix.mixture.decoding.alternating import DecodingStatistics

matplotlib.use("svg")
import matplotlib.pyplot as plt


def measure(args: argparse.Namespace) -> list[tuple[float, float, str]]:
    """Acceptance rate, passes a token and a label of each point."""
    policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
    policy.generation_config.eos_token_id = None
    prompts = torch.randint(1, policy.config.vocab_size, (args.sequences, 16))
    points = []
    for noise, alpha in itertools.product(args.noise, args.alphas):
        torch.manual_seed(0)
        anchor = copy.deepcopy(policy)
        for p in anchor.parameters():
            p.data += noise * p.data.std() * torch.randn_like(p)
        model = LogitMixForCausalLM.from_members(policy, anchor, alpha=alpha)
        output = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=args.tokens,
            decoding="alternating", return_dict_in_generate=True,
        )  # fmt: skip
        counted: DecodingStatistics = output.statistics
        points.append((counted.acceptance, counted.passes_per_token, f"noise {noise:g}, alpha {alpha:g}"))
        print(f"{points[-1][2]}: acceptance {counted.acceptance:.3f}, {counted.passes_per_token:.3f} passes a token")
    return points


def plot(points: list[tuple[float, float, str]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot([0, 1], [2, 1], color="0.4", label="2 - a")
    axes.axhline(2, color="0.4", linestyle=":", label="joint decoding")
    axes.plot([a for a, *_ in points], [passes for _, passes, _ in points], "o", label="measured")
    axes.set(xlabel="acceptance rate a", ylabel="member passes a token", xlim=(0, 1), ylim=(0.9, 2.1))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02, 0.1, 0.25, 0.5])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("docs/images/decoding_passes.svg"))
    args = parser.parse_args()
    torch.manual_seed(0)
    plot(measure(args), args.output)


if __name__ == "__main__":
    main()
