"""Memory and traffic per GPU in training, computed from the members' sizes: the table of docs/scaling.md.

python benchmarks/memory_and_traffic.py
"""

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

SIZES = {  # hidden, layers, heads, KV heads, MLP: Qwen2.5's config.json
    "7B": (3584, 28, 28, 4, 18944),
    "72B": (8192, 80, 64, 8, 29568),
}
GB, BF16, FP32 = 1e9, 2, 4
LINK = 50  # GB/s into a GPU, and as many out of it


def parameters(hidden, layers, heads, kv_heads, intermediate):
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def row(name, gpus, how, P, A):
    """Print a row, for P trained parameters and A of the frozen anchor. Ring collectives move (n-1)/n of the data."""
    ring, shards = (gpus - 1) / gpus, gpus if how == "FSDP2" else 1
    states = (P * (FP32 + 2 * FP32 + FP32) + A * FP32) / shards  # weights, AdamW's moments, gradients; the anchor
    if how == "FSDP2":
        whole = (P + A) * BF16  # during rollouts
        rollouts = ring * whole
        update = ring * ((2 * P + A) * BF16 + P * FP32)  # gather: forward and backward, the anchor forward; reduce
    else:
        whole = P * BF16  # autocast's copies, in the update
        rollouts, update = 0, 2 * ring * P * FP32 * (gpus > 1)  # all-reduce
    numbers = (states / GB, whole / GB, rollouts / GB, update / GB, update / GB / LINK)
    print(f"{name:>4} {gpus:5} {how:>6}" + "".join(f"{n:12.1f}" for n in numbers))


print("     GPUs                states       whole    rollouts      update   at 50 GB/s")
for name, size in SIZES.items():
    count = parameters(*size)
    for gpus, how in ((1, "-"), (8, "DDP"), (8, "FSDP2"), (64, "FSDP2")):
        row(name, gpus, how, count, count)
    print(f"     {count:,} parameters")
