"""Tiny random models of other kinds than Llama: mixtures of experts, hybrids, a wrapper."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MODELS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "decoder_sparse_step": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    "gpt_neox": {},
    "mamba": {"state_size": 8, "time_step_rank": 16},
    "qwen3_next": {
        **EXPERTS,
        **{"shared_expert_intermediate_size": 48, "head_dim": 8, "decoder_sparse_step": 1},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma3": {},  # with a part for images
}


def save(kind, folder, **changes):
    """Save a tiny random model of a kind, with changes of its config; returns the folder."""
    torch.manual_seed(0)
    if kind == "gemma3":
        text = {**SMALL, "head_dim": 8, "sliding_window": 16, **changes}
        vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
        vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
        ids = {"image_token_index": 127, "boi_token_index": 125, "eoi_token_index": 126}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
        model = Gemma3ForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(kind, **{**SMALL, **MODELS[kind], **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def make(kind, folder, **changes):
    """As `save`, and GPT-2, whose layers lie as [C, R]."""
    if kind != "gpt2":
        return save(kind, folder, **changes)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64, **changes)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
