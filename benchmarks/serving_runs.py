"""What `serving.py` times: five engines of vLLM on models of one size, a loop over two models, and weight syncs.

Import it before torch and vLLM, whose environment it sets.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engines in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl.generation import vllm_generation
from vllm import LLM, SamplingParams

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.alternating import alternating_decoding
from logitmix.training.rollouts.vllm import MixtureVLLMGeneration

ALPHA = 0.4
PROMPT_TOKENS = 32
GROUP, LOOP_BATCH = 8, 8
DRAFTS = {"method": "draft_model", "num_speculative_tokens": 2}
SIZES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 8192},
    # as Qwen2.5-1.5B
    "cuda": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
}  # fmt: skip
ENGINE = {
    "cpu": {"dtype": "float32", "enforce_eager": True},
    "cuda": {"dtype": "bfloat16", "gpu_memory_utilization": 0.2},
}

Run = tuple[str, int]  # a name and a number of requests


class Models:
    """The mixtures and the model on disk, and the mixture of two full members in memory."""

    def __init__(self, folder: Path, device: str) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, ENGINE[device]["dtype"])
        config = Qwen2Config(**SIZES[device], tie_word_embeddings=False, max_position_embeddings=1024)
        config.initializer_range = 0.05  # large enough that the members disagree
        base, adapters = folder / "base", [folder / "policy_adapter", folder / "anchor_adapter"]
        Qwen2ForCausalLM(config).to(dtype).save_pretrained(base)
        for path in adapters:
            lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(Qwen2ForCausalLM.from_pretrained(base), lora).save_pretrained(path)
        self.adapters = folder / "adapters"
        self.shared = LogitMixForCausalLM.from_members(str(adapters[0]), str(adapters[1]), ALPHA, dtype=dtype)
        self.shared.save_pretrained(self.adapters)
        self.two, self.one = folder / "two", folder / "one"
        members = [merge_adapter(path, dtype) for path in adapters]
        members[0].save_pretrained(self.one)
        self.mixture = LogitMixForCausalLM.from_members(members[0], members[1], ALPHA).to(device)
        self.mixture.policy.requires_grad_(True)  # merging froze it, and only trainable weights are synchronised
        self.mixture.save_pretrained(self.two)
        self.near = folder / "near"
        LogitMixForCausalLM.from_members(members[0], with_noise(self.one, dtype), ALPHA).save_pretrained(self.near)


def merge_adapter(adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype).merge_and_unload().eval()


def with_noise(folder: Path, dtype: torch.dtype, share: float = 0.01) -> PreTrainedModel:
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight += share * weight.std() * torch.randn_like(weight)
    return model.eval()


class Rollouts(MixtureVLLMGeneration):
    """The trainer's rollouts, in an engine that exists already."""

    weights_are_discarded = False  # if true, a sync pushes all weights

    def __init__(self, model: LogitMixForCausalLM, accelerator: Accelerator, llm: LLM, tokens: int) -> None:
        settings = {"max_completion_length": tokens, "generation_kwargs": {"ignore_eos": True}}
        with mock.patch.object(vllm_generation, "LLM", return_value=llm):
            super().__init__(model, accelerator, None, **settings)


class Benchmark:
    """The engines, and the runs that are timed, by name and number of requests."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.device = device = args.device
        self.tokens = args.tokens
        self.loads = {"none": 0, "one": 1, "many": args.requests, "rollouts": args.rollouts}
        self.models = Models(folder, device)
        accelerator = Accelerator(cpu=device == "cpu")  # before vLLM, as in the trainer
        most, length = max(self.loads.values()), PROMPT_TOKENS + args.tokens
        settings = {"max_model_len": length, "max_num_seqs": most, "skip_tokenizer_init": True} | ENGINE[device]
        engine = partial(LLM, enable_prefix_caching=False, disable_log_stats=True, **settings)
        self.engines = {
            "one": engine(str(self.models.one)),
            "two": engine(str(self.models.two), logprobs_mode="processed_logprobs"),
            "adapters": engine(str(self.models.adapters)),
            "alternating": engine(str(self.models.near), **alternating_decoding()),
            "drafts": engine(str(self.models.near), speculative_config=DRAFTS | {"model": str(self.models.near)}),
        }
        self.rollouts = Rollouts(self.models.mixture, accelerator, self.engines["two"], args.tokens)
        shared = self.models.shared.to(device)
        self.adapter_rollouts = Rollouts(shared, accelerator, self.engines["adapters"], args.tokens)
        generator = torch.Generator().manual_seed(1)
        vocab_size = SIZES[device]["vocab_size"]
        self.prompts = torch.randint(3, vocab_size, (most, PROMPT_TOKENS), generator=generator).tolist()

    def generate(self, name: str, requests: int, alphas: bool = False, length: int | None = None) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=0.0, max_tokens=length or self.tokens, ignore_eos=True, detokenize=False,
                extra_args={"alpha": i / requests} if alphas else None,
            )
            for i in range(requests)
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in self.prompts[:requests]]
        return [list(o.outputs[0].token_ids) for o in self.engines[name].generate(prompts, params, use_tqdm=False)]

    def groups(self) -> list[list[int]]:
        return [ids for ids in self.prompts[: self.loads["rollouts"] // GROUP] for _ in range(GROUP)]

    def runs(self) -> dict[Run, Callable[[], Any]]:
        few, many, rollouts = (self.loads[load] for load in ("one", "many", "rollouts"))
        runs: dict[Run, Callable[[], Any]] = {
            (name, requests): partial(self.generate, name, requests)
            for requests in (few, many)
            for name in self.engines
        }
        runs["alphas", many] = partial(self.generate, "two", many, alphas=True)
        runs["rollouts", rollouts] = lambda: self.rollouts.generate(self.groups(), None, GROUP)
        runs["loop", rollouts] = lambda: sample_in_a_loop(self.models.mixture, self.groups(), self.tokens)
        runs["sync", 0] = self.sync
        runs["sync_adapter", 0] = self.adapter_rollouts.sync_weights
        runs["sync_all", 0] = partial(self.sync, everything=True)
        return runs

    def sync(self, everything: bool = False) -> None:
        self.rollouts.weights_are_discarded = everything
        self.rollouts.sync_weights()

    def seconds(self, run: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - start

    def check(self) -> None:
        """Check that mixtures of one distribution, and the loop, have the same greedy tokens."""
        two, adapters, turns, drafts = (self.generate(name, 4, length=8) for name in list(self.engines)[1:])
        assert two == adapters or self.device == "cuda", (two, adapters)  # bfloat16 rounds differently
        assert turns == drafts or self.device == "cuda", (turns, drafts)
        policy = self.engines["two"].generate(
            [{"prompt_token_ids": ids} for ids in self.prompts[:4]],
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, extra_args={"alpha": 0.0}),
            use_tqdm=False,
        )
        one = self.generate("one", 4, length=8)
        assert [list(o.outputs[0].token_ids) for o in policy] == one or self.device == "cuda"
        looped = sample_in_a_loop(self.models.mixture, self.prompts[:4], 8, greedy=True)
        assert looped == two or self.device == "cuda", (looped, two)


@torch.no_grad()
def sample_in_a_loop(
    mixture: LogitMixForCausalLM, prompts: list[list[int]], length: int, greedy: bool = False
) -> list[list[int]]:
    """Completions of prompts of equal length, sampled token by token from two models."""
    alpha = mixture.alpha
    completions: list[list[int]] = []
    for start in range(0, len(prompts), LOOP_BATCH):
        ids = torch.tensor(prompts[start : start + LOOP_BATCH], device=mixture.device)
        caches: list[Any] = [None, None]
        tokens: list[Tensor] = []
        for _ in range(length):
            logits = []
            for i, member in enumerate((mixture.policy, mixture.anchor_0)):
                output = member(input_ids=ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                caches[i] = output.past_key_values
                logits.append(output.logits[:, -1].float())
            z_mix = (1 - alpha) * logits[0] + alpha * logits[1]
            ids = z_mix.argmax(-1, keepdim=True) if greedy else torch.multinomial(z_mix.softmax(-1), 1)
            tokens.append(ids)
        completions += torch.cat(tokens, 1).tolist()
    return completions


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def megabytes(weights: Iterable[Tensor]) -> float:
    return sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
