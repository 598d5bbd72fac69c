"""Tiny members with seeded weights, and a tokenizer with one token per character.

The weights have a large `initializer_range`, so the members disagree, no two tokens tie, and an error of one position
or one row changes the generated tokens.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB_SIZE = 61
PAD = 0

INPUT = {
    "input_ids": torch.tensor([[PAD, PAD, 5, 17, 9], [12, 50, 7, 33, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}

# Each architecture has a different depth, width and number of heads
_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "qwen2": lambda **kwargs: Qwen2Config(
        **(_decoder(hidden_size=32, num_hidden_layers=2, heads=4, kv_heads=2) | kwargs)
    ),
    "qwen2-sliding": lambda **kwargs: Qwen2Config(
        **_decoder(hidden_size=32, num_hidden_layers=3, heads=4, kv_heads=4),
        **({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} | kwargs),
    ),
    "llama": lambda **kwargs: LlamaConfig(
        **(_decoder(hidden_size=24, num_hidden_layers=3, heads=3, kv_heads=1) | {"head_dim": 12} | kwargs)
    ),
    "gemma2": lambda **kwargs: Gemma2Config(
        **_decoder(hidden_size=32, num_hidden_layers=2, heads=2, kv_heads=1),
        **({"head_dim": 16, "sliding_window": 4} | kwargs),
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gpt2": lambda **kwargs: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=PAD, **kwargs,
    ),
    "mixtral": lambda **kwargs: MixtralConfig(
        **_decoder(hidden_size=16, num_hidden_layers=2, heads=2, kv_heads=2),
        **({"num_local_experts": 3, "num_experts_per_tok": 2} | kwargs),
    ),
}  # fmt: skip

ARCHITECTURES = list(_CONFIGS)


def _decoder(hidden_size: int, num_hidden_layers: int, heads: int, kv_heads: int) -> dict:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }


def tiny_config(architecture: str = "qwen2", **kwargs) -> PreTrainedConfig:
    return _CONFIGS[architecture](**kwargs)


def tiny_member(architecture: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs):
    """A model of `architecture` in evaluation mode, its weights drawn from `seed`; `kwargs` go to its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(architecture, **kwargs), dtype=dtype)
    return model.eval()


def edit_logits(member, edit):
    """The member, whose logits are edited in place at every pass."""

    def hook(module, args, output):
        edit(output.logits)

    member.register_forward_hook(hook)
    return member


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=().,:;?!<>[]{}|&"


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Token 0 is padding, 1 opens a text, 2 ends it; every character of `characters` is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<pad>",  # AutoTokenizer reads it as Qwen2's beside a Qwen2 model, which would add a token for it
        padding_side="left",
    )


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**INPUT, **kwargs).logits


def gradients(model, **kwargs):
    model.zero_grad()
    model(**INPUT, labels=INPUT["input_ids"], **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_frozen(model):
    """Whether no anchor requires gradients or is in training mode."""
    return all(not p.requires_grad for anchor in model.anchors for p in anchor.parameters()) and not any(
        module.training for anchor in model.anchors for module in anchor.modules()
    )
