"""Alternating decoding against joint decoding (greedy) and against enumerated probabilities (sampled)."""

import itertools
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig

from logitmix.mixture.alternating import alternating_completions
from logitmix.mixture.generation import GREEDY, generate_completions
from logitmix.mixture.mixing import mix_logits
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.speculation import SpeculativeSampler
from tests.helpers.architectures import tiny_causal_model
from tests.helpers.members import character_tokenizer, tiny_member

PROMPTS = [[5, 17, 9, 33, 21, 8, 40], [12], [44, 3, 29, 18, 56], [7, 7]]
NEW_TOKENS = 20  # several windows of the sliding members, which have 4 tokens

PAIRS = {
    "Qwen2 with itself at another seed": ("qwen2", "qwen2"),
    "Qwen2 with Llama": ("qwen2", "llama"),
    "sliding windows with full attention": ("qwen2-sliding", "llama"),
    "full attention with sliding windows": ("qwen2", "qwen2-sliding"),
    "soft-capped logits": ("gemma2", "llama"),
    "learned positions": ("gpt2", "qwen2"),
    "a mixture of experts": ("qwen2", "mixtral"),
}


def mixture(*architectures, **kwargs):
    return LogitMixForCausalLM.from_members(
        tiny_member(architectures[0], 0), [tiny_member(name, 1 + i) for i, name in enumerate(architectures[1:])], **kwargs
    )


def joint(model, prompts=PROMPTS, alphas=0.4, **settings):
    settings = GREEDY | {"max_new_tokens": NEW_TOKENS, "eos_token_id": None} | settings
    return generate_completions(model, character_tokenizer(), prompts, settings, alpha=alphas)


def alternating(model, prompts=PROMPTS, alphas=0.4, eos=(), **settings):
    return alternating_completions(model, prompts, GREEDY | {"max_new_tokens": NEW_TOKENS} | settings, eos, alphas)


def edit_logits(member, edit):
    member.register_forward_hook(lambda module, args, output: output | {"logits": edit(output.logits)}
                                 if isinstance(output, dict) and not hasattr(output, "logits")
                                 else _with_logits(output, edit))  # fmt: skip
    return member


def _with_logits(output, edit):
    output.logits = edit(output.logits.clone())
    return output
