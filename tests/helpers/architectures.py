"""Every causal architecture of the installed transformers in miniature."""

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.members import PAD, VOCAB_SIZE

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Sizes by the names that configurations use; one applies where the architecture's configuration has the name
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size"), 32),
    "word_embed_proj_dim": 32,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "dff"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "is_decoder": True,
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 14),
    "depth": 1,
    "sliding_window": 8,
    "use_cache": True,
}

_MLA = {"num_key_value_heads": 4, "qk_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}

# What an architecture needs beyond its sizes, by model type of the text configuration
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "youtu", "minicpm3"), _MLA),
    "longcat_flash": {"num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 8, "expert_ffn_hidden_size": 16,
                      "zero_expert_num": 2},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | _HYBRID,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_dt_rank": 4},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"), _HYBRID),
    "kimi_linear": _HYBRID | {"linear_num_heads": 2, "linear_head_dim": 8,
                             "num_key_value_heads": 4, "qk_head_dim": 16},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
                       "indexer_compress_ratio": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "codegen": {"rotary_dim": 4, "n_head": 4, "n_embd": 64},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                     "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [48, 48]},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                    "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"], "mamba_dt_rank": 4,
              "mamba_expand": 2, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"], "mamba_expand": 2,
               "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "adapter_rank": 4, "num_mem_blocks": 1,
               "hybrid_layer_ids": [1, 2]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "moe_latent_size": None,
                   "moe_shared_expert_intermediate_size": 16},
    "roc_bert": {"shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
}  # fmt: skip


def tiny_causal_config(model_type: str) -> PreTrainedConfig:
    """A configuration of `model_type` with sizes of a few dozen, also of its parts."""
    return _tiny(CONFIG_MAPPING[model_type])


def _tiny(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in _SIZES.items() if name in names}
    parts = {name: _tiny(part) for name, part in config_class.sub_configs.items() if part is not AutoConfig}
    return config_class(**sizes | parts | _OWN.get(config_class.model_type, {}))


def tiny_causal_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of `model_type` in evaluation mode, its weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_causal_config(model_type))
    return model.eval()


# What transformers cannot build from a small configuration alone, and why
NOT_TRIED = {
    "blt": "it needs configurations of a patcher, encoders and a decoder that fit each other",
    "cohere_compass_text": "its attention layers need rope parameters of each layer type",
    "gemma3n": "its vision tower needs the package timm",
    "gemma3n_text": "at this size its logits are not finite in training, also in TRL alone",
    "gemma4_assistant": "it drafts for another model, on whose hidden states it runs",
    "gemma4_unified_assistant": "it drafts for another model, on whose hidden states it runs",
    "got_ocr2": "the sizes of its vision model are fixed, and large",
    "musicgen": "it needs a text encoder and an audio encoder",
    "musicgen_melody": "it needs a text encoder and an audio encoder",
    "xlstm": "its kernels need matching sizes of heads and chunks",
}
