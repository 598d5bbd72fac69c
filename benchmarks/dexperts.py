"""DExperts of three models: `generate` of the mixture against the loop that its papers' scripts run.

    python benchmarks/dexperts.py [--model tiny|FOLDER] [--prompt 128] [--new 64] [--rounds 3]

The loop has three models with a KV cache each, and in Python, for every token, three forward passes, the sum of their
logits, and the greedy token (as in the scripts of DExperts and proxy tuning). Both sides decode the same greedy tokens
from the same weights, in turns in one process; the ratio is the median of the rounds'. Times are processor time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from logitmix.presets import dexperts

ALPHA = 1.5


@torch.no_grad()
def loop(models: Sequence[PreTrainedModel], ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens of `z_base + alpha (z_expert - z_antiexpert)`, with a cache a model."""
    caches = [DynamicCache(config=model.config) for model in models]
    unread = ids
    for _ in range(new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -unread.shape[1] :]
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        outputs = [model(unread, past_key_values=cache, **inputs) for model, cache in zip(models, caches, strict=True)]
        base, expert, antiexpert = (output.logits[:, -1] for output in outputs)
        unread = (base + ALPHA * (expert - antiexpert)).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, unread], 1), torch.cat([mask, torch.ones_like(unread)], 1)
    return ids


def tiny_model() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=4, initializer_range=0.1)
    )  # fmt: skip


def load(source: str) -> list[PreTrainedModel]:
    """Three members: the model, and two copies with a little noise."""
    torch.manual_seed(0)
    first = tiny_model() if source == "tiny" else AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    models = [first.eval(), *(copy.deepcopy(first).eval() for _ in range(2))]
    with torch.no_grad():
        for model in models[1:]:
            for parameter in model.parameters():
                parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = load(args.model)
    mixture = dexperts(*models, alpha=ALPHA).eval()
    mixture.generation_config.eos_token_id = None
    ids = torch.randint(3, models[0].config.vocab_size, (args.batch, args.prompt))
    mask = torch.ones_like(ids)
    mask[: args.batch // 2, : args.prompt // 4] = 0  # half of the prompts are shorter

    def generate() -> torch.Tensor:
        return mixture.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.new, do_sample=False, pad_token_id=0
        )

    sides = {"loop": lambda: loop(models, ids, mask, args.new), "generate": generate}
    outputs = {name: run() for name, run in sides.items()}  # also warms up
    same = (outputs["loop"] == outputs["generate"]).float().mean().item()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    ratio = statistics.median(a / b for a, b in zip(times["loop"], times["generate"], strict=True))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(
        f"{args.model}: {args.batch} sequences of {args.prompt} + {args.new} tokens, {100 * same:.2f} % equal tokens"
    )
    print(f"loop {medians['loop']:.2f} s, generate {medians['generate']:.2f} s of processor time: {ratio:.2f} times")


if __name__ == "__main__":
    main()
