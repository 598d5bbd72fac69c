"""Tiny mixtures that vLLM's CPU build can run.

Its attention supports only head sizes such as 32, 64 and 80, so the members are wider than those of `members.py`.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import VOCAB_SIZE, character_tokenizer


def _decoder(width=64, layers=2, heads=2, kv_heads=1, **kwargs):
    return {
        "vocab_size": VOCAB_SIZE, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128,
        "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | kwargs  # fmt: skip


def _backend_decoder():
    """For architectures that vLLM runs through transformers' classes."""
    config = _decoder(layers=3)
    return {key: value for key, value in config.items() if key != "num_key_value_heads"}


CONFIGS = {
    "qwen2": lambda **kwargs: Qwen2Config(**_decoder(128, heads=4, kv_heads=2, **kwargs)),
    "llama": lambda **kwargs: LlamaConfig(**_decoder(64, layers=3, **kwargs)),
    "qwen3": lambda **kwargs: Qwen3Config(**_decoder(64, head_dim=64, **kwargs)),
    "mistral": lambda **kwargs: MistralConfig(**_decoder(64, head_dim=32, sliding_window=8, **kwargs)),
    "gemma2": lambda: Gemma2Config(
        **_decoder(64, head_dim=32, sliding_window=8, attn_logit_softcapping=5.0) | {"tie_word_embeddings": True},
        final_logit_softcapping=3.0,
    ),
    "gpt2": lambda **kwargs: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.15,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **kwargs,
    ),
    "gptj": lambda **kwargs: GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=2, n_positions=128, rotary_dim=16, initializer_range=0.15,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **kwargs,
    ),
    "gpt_neox": lambda **kwargs: GPTNeoXConfig(**_backend_decoder(), rotary_pct=0.25, **kwargs),
    "phi": lambda **kwargs: PhiConfig(**_backend_decoder(), partial_rotary_factor=0.5, **kwargs),
    "qwen3_moe": lambda **kwargs: Qwen3MoeConfig(
        **_decoder(64, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **kwargs)
    ),
}  # fmt: skip


def build_member(architecture, seed=0, **kwargs):
    """A member with weights and biases drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers' default attention ignores Gemma 2's soft-cap
        model = AutoModelForCausalLM.from_config(
            CONFIGS[architecture](**kwargs), dtype=torch.float32, attn_implementation="eager"
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.2)
    return model.eval()


def build_mixture(*architectures, scheme="logit", weights=None, alpha=None):
    """A mixture of full members, with a tokenizer that `save_pretrained` saves too."""
    members = [build_member(architecture, seed) for seed, architecture in enumerate(architectures)]
    mixture = LogitMixForCausalLM.from_members(members[0], members[1:], alpha=alpha, weights=weights, scheme=scheme)
    mixture.tokenizer = character_tokenizer()
    return mixture


def save_member(path, architecture="qwen2", seed=0, **kwargs):
    """Save a member with a tokenizer; return its folder."""
    build_member(architecture, seed, **kwargs).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return str(path)
