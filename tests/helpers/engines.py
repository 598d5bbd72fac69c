"""Tiny mixtures on the disk, vLLM engines of them in this process, and what transformers makes of the same tokens.

vLLM's CPU build has attention for head sizes 32, 64, 80, … only, so the members are wider than in the other tests.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from peft import get_peft_model
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
from tests.helpers.adapters import lora
from tests.helpers.members import VOCAB_SIZE, character_tokenizer

TOLERANCE = 5e-5  # nats, float32: the log-probabilities are of magnitude 10
PROMPTS = [
    [5, 6, 7, 8],
    [9, 10],
    [int(i) for i in torch.randint(3, VOCAB_SIZE, (29,), generator=torch.Generator().manual_seed(0))],
    [11, 12, 13, 14, 15, 16, 17],
]
ALPHAS = [None, 0.0, 0.3, 1.0]


def _decoder(width=64, layers=2, heads=2, kv_heads=1, **kwargs):
    return {
        "vocab_size": VOCAB_SIZE, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128,
        "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | kwargs  # fmt: skip


def _of_the_transformers_backend():
    """Architectures that vLLM has none of its own for."""
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
    "gpt_neox": lambda **kwargs: GPTNeoXConfig(**_of_the_transformers_backend(), rotary_pct=0.25, **kwargs),
    "phi": lambda **kwargs: PhiConfig(**_of_the_transformers_backend(), partial_rotary_factor=0.5, **kwargs),
    "qwen3_moe": lambda **kwargs: Qwen3MoeConfig(
        **_decoder(64, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **kwargs)
    ),
}  # fmt: skip


def member(architecture, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # transformers' other attention leaves out Gemma 2's soft-cap
        model = AutoModelForCausalLM.from_config(
            CONFIGS[architecture](**kwargs), dtype=torch.float32, attn_implementation="eager"
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.2)
    return model.eval()


def mixture_of(*architectures, scheme="logit", weights=None, alpha=None):
    members = [member(architecture, seed) for seed, architecture in enumerate(architectures)]
    mixture = LogitMixForCausalLM.from_members(members[0], members[1:], alpha=alpha, weights=weights, scheme=scheme)
    mixture.tokenizer = character_tokenizer()
    return mixture


def save_member(path, architecture="qwen2", seed=0, **kwargs):
    member(architecture, seed, **kwargs).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return str(path)


def save_adapter(path, base, seed, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(init_lora_weights=False, **kwargs))
    model.save_pretrained(path)
    return str(path)


@contextmanager
def engine(folder, **kwargs) -> Iterator:
    """vLLM's `LLM` of a checkpoint; afterwards the process can build another."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}
    llm = LLM(str(folder), **(arguments | {"disable_log_stats": True} | kwargs))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def greedy(asked=None, **kwargs):
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0, "max_tokens": 12, "logprobs": 0, "ignore_eos": True} | kwargs, extra_args=asked
    )


def generate(llm, prompts, params):
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def token_log_probs(mixture, ids, **weights):
    """Of every token but the first, under the mixture."""
    with torch.no_grad():
        log_probs = mixture(input_ids=torch.tensor([ids]), **weights).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def difference(mixture, prompt, output, **weights):
    """The largest difference in log-probability of a generated token (and of the prompt's, where asked for)."""
    tokens = list(output.outputs[0].token_ids)
    positions = list(output.outputs[0].logprobs)
    if output.prompt_logprobs:
        positions = list(output.prompt_logprobs)[1:] + positions
    ids = prompt + tokens
    theirs = torch.tensor([p[t].logprob for p, t in zip(positions, ids[-len(positions) :], strict=True)])
    return (token_log_probs(mixture, ids, **weights)[-len(positions) :] - theirs).abs().max().item()


def greedy_tokens(mixture, prompt, length, **weights):
    ids = mixture.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, **weights)
    return ids[0, len(prompt) :].tolist()


def assert_same(mixture, llm, prompts=PROMPTS, asked=None, **params):
    """vLLM's greedy tokens and log-probabilities are transformers', each request under what it asks for."""
    asked = asked or [{} if alpha is None else {"alpha": alpha} for alpha in ALPHAS]
    outputs = generate(llm, prompts, [greedy(a or None, **params) for a in asked])
    for prompt, output, weights in zip(prompts, outputs, asked, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == greedy_tokens(mixture, prompt, len(tokens), **weights)
        assert difference(mixture, prompt, output, **weights) < TOLERANCE
