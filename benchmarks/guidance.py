"""Classifier-free guidance: a mixture of one model with itself, against loops over two forward passes a token.

    python benchmarks/guidance.py [--model tiny|FOLDER] [--output benchmarks/results/guidance.md]

Time, at `--batch` sequences: `generate` of the mixture, which holds the weights once and runs one pass a token; the
loop of the methods' scripts, with two models, a KV cache each, and the mixing in Python; and transformers'
`generate(guidance_scale=…)`, which runs its second pass in a logits processor. All decode the same greedy tokens, in
turns in one process; a ratio is the median of the rounds'. Times are processor time.

Memory, at `--memory_batch` sequences of `--memory_prompt` tokens: the most that a process of its own held while it
decoded, above what it held before it loaded the weights, for the model alone, the mixture, and the loop.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from process_memory import memory_now, peak_memory
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from logitmix import LogitMixForCausalLM
from logitmix.runs.provenance import processor

SCALE = 1.5


def load(source: str) -> PreTrainedModel:
    if source != "tiny":
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def loop(models: tuple[PreTrainedModel, PreTrainedModel], prompts: tuple[Tensor, Tensor], new_tokens: int) -> Tensor:
    """Greedy tokens of `log p(v|n) + s (log p(v|x) - log p(v|n))`, with a model and a cache for each prompt."""
    caches = [DynamicCache(config=model.config) for model in models]
    unread, new = list(prompts), []
    for _ in range(new_tokens):
        steps = zip(models, unread, caches, strict=True)
        own, negative = (m(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1] for m, ids, cache in steps)
        own, negative = own.log_softmax(-1), negative.log_softmax(-1)
        new.append((negative + SCALE * (own - negative)).argmax(-1, keepdim=True))
        unread = [new[-1]] * 2
    return torch.cat(new, dim=1)


def sides(args: argparse.Namespace, batch: int, prompt: int, new: int) -> dict[str, Callable[[], Tensor]]:
    """What is compared: each returns the new tokens. A model is copied only when its side needs two."""
    model = load(args.model)
    draw, V = torch.Generator().manual_seed(1), model.config.vocab_size
    ids, negative = (torch.randint(3, V, (batch, n), generator=draw) for n in (prompt, args.negative or prompt))
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    mixture = LogitMixForCausalLM.from_members(model, model, weights=[SCALE, 1 - SCALE])

    copies: list[PreTrainedModel] = []

    def loop_of_two_models() -> Tensor:
        if not copies:
            copies.append(copy.deepcopy(model))
        return loop((model, copies[0]), (ids, negative), new)

    return {
        "model alone": lambda: model.generate(ids, **settings)[:, prompt:],
        "generate": lambda: mixture.generate(ids, **settings, member_prompts={"anchor": negative})[:, prompt:],
        "loop": loop_of_two_models,
        "guidance_scale": lambda: model.generate(
            ids, **settings, guidance_scale=SCALE, negative_prompt_ids=negative,
        )[:, prompt:],
    }  # fmt: skip


def seconds(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    tokens = run()
    return time.process_time() - start, tokens


def peak(args: argparse.Namespace, side: str) -> float:
    """GB that a process of its own held at most, without libraries."""
    command = [sys.executable, __file__, "--model", args.model, "--negative", str(args.negative), "--side", side]
    command += ["--memory_batch", str(args.memory_batch), "--memory_prompt", str(args.memory_prompt)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(args: argparse.Namespace) -> str:
    compared = sides(args, args.batch, args.prompt, args.new)
    rounds: list[dict[str, float]] = []
    for i in range(args.rounds + 1):
        timed = {name: seconds(run) for name, run in compared.items()}
        tokens = [timed[name][1] for name in ("generate", "loop", "guidance_scale")]
        assert all(torch.equal(tokens[0], others) for others in tokens[1:])
        if i:  # the first warms up
            rounds.append({name: spent for name, (spent, _) in timed.items()})
    negative = f"{args.negative} tokens" if args.negative else "as many"
    size = load(args.model).num_parameters() / 1e6
    lines = [
        "# Guidance",
        "",
        f"`python benchmarks/guidance.py --model {'tiny' if args.model == 'tiny' else 'FOLDER'} --new {args.new}`: "
        f"{size:.0f}M parameters, {args.batch} sequences, prompts of",
        f"{args.prompt} tokens, negative prompts of {negative}, {args.new} new tokens, float32, threads: "
        f"{args.threads}, {processor()['name']}.",
        "",
        "| | CPU seconds | times that of `generate` |",
        "|---|---|---|",
    ]
    for name in compared:
        ratio = statistics.median(each[name] / each["generate"] for each in rounds)
        lines.append(f"| {name} | {statistics.median(each[name] for each in rounds):.2f} | {ratio:.2f} |")
    peaks = {name: peak(args, name) for name in ("model alone", "generate", "loop")}
    lines += [
        "",
        f"Peak memory at {args.memory_batch} sequences of {args.memory_prompt} tokens:",
        "",
        "| | GB | times that of the model alone |",
        "|---|---|---|",
        *(f"| {name} | {value:.2f} | {value / peaks['model alone']:.2f} |" for name, value in peaks.items()),
        "",
        f"{date.today()}, Python {sys.version.split()[0]}, torch {version('torch')}, transformers "
        f"{version('transformers')}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--negative", type=int, default=0, help="tokens of the negative prompt; 0: as the prompt")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory_batch", type=int, default=4)
    parser.add_argument("--memory_prompt", type=int, default=512)
    parser.add_argument("--side", help="run this side once, and print the memory that the process held")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        before = memory_now("cpu")
        run = sides(args, args.memory_batch, args.memory_prompt, 8)[args.side]
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        run()
        print((peak_memory("cpu") - before) / 1e9)
        return
    text = report(args)
    print(text)
    if args.output:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
