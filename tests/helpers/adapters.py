"""Mixtures of adapters, and the same mixtures of full models."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.members import character_tokenizer, tiny_member

KINDS = ["full anchor", "two adapters", "base anchor"]


def lora(**kwargs):
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | kwargs
    )


def save_adapter(path, base, seed, **kwargs):
    """Save an adapter with PEFT, its weights drawn from `seed`; return its folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora(init_lora_weights=False, **kwargs))
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(path)
    return str(path)


def save_folders(path):
    """Save two full models with a tokenizer, and two adapters on the first; return the folders by name."""
    for seed, name in enumerate(["base", "sft"]):
        tiny_member("qwen2", seed).save_pretrained(path / name)
        character_tokenizer().save_pretrained(path / name)
    base = str(path / "base")
    return {
        "base": base,
        "sft": str(path / "sft"),
        "policy adapter": save_adapter(path / "policy_adapter", base, 1),
        "anchor adapter": save_adapter(path / "anchor_adapter", base, 2, r=6, target_modules=["k_proj", "v_proj"]),
    }


def anchor_of(kind, folders):
    return folders[{"full anchor": "sft", "two adapters": "anchor adapter", "base anchor": "base"}[kind]]


def mixture(kind, folders, **kwargs):
    """A mixture whose policy is a loaded adapter."""
    return LogitMixForCausalLM.from_members(
        folders["policy adapter"], anchor_of(kind, folders), **{"alpha": 0.3} | kwargs
    )


def reference(source):
    """The member as loaded by transformers, an adapter by PEFT."""
    path = Path(source) / "adapter_config.json"
    if not path.exists():
        return AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(json.loads(path.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, source).eval()


def merged_mixture(kind, folders, **kwargs):
    """The same mixture of two full models."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    policy = PeftModel.from_pretrained(base, folders["policy adapter"]).merge_and_unload()
    anchor = AutoModelForCausalLM.from_pretrained(folders["sft" if kind == "full anchor" else "base"])
    if kind == "two adapters":
        anchor = PeftModel.from_pretrained(anchor, folders["anchor adapter"]).merge_and_unload()
    policy.requires_grad_(True)
    return LogitMixForCausalLM.from_members(policy.eval(), anchor.eval(), **{"alpha": 0.3} | kwargs)


VARIANTS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "rank_pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}
