"""Tiny random models of every family that transformers knows, by rules over the fields of their configs.

A rule names fields and gives a small value. What the rules do not get right for a family stands in `SPECIAL`.
The sizes are all different where they may be, so that no matrix is taken for another one by its shape.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

TOKENS = range(3, 200)  # ids that mean nothing special to any of the models
# Fields by name, the first that matches counts -> the small value. Widths are multiples of 16, as 2:4 needs.
RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size(_per_layer_input)?|ngram_vocab_size_base|encoder_hash_byte_group_vocab", 256),
    (r"make_ngram_vocab_size_divisible_by|split_ngram_parts", 8),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r".*eos_token_id", 2),
    (r"original_max_position_embeddings", 64),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_(target|source)_positions", 128),
    (r"context_length|position_embedding_size|num_position_embeddings", 128),
    (r"(.*sliding_window|window_size|attention_chunk_size|.*local_attention.*|attention_window_size)", 16),
    (r"sliding_window_size|keep_window_size", 16),
    (r"layer_group_size|.*(_period|sliding_window_pattern|_interval|_every_n_layers|sparse_step)", 2),
    (r"(attn|expert)_layer_offset", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"num_hidden_layers|n_layers?|num_layers|layers|num_(en|de)coder_layers|(en|de)coder_layers", 2),
    (r"depth|.*_num_hidden_layers|num_blocks|num_global_layers|resampler_depth|num_lstm_layers", 2),
    (r"aligner_num_add_layers|max_window_layers|num_layers_per_stack", 2),
    (r"n_layers_per_attn_res_block", 1),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|kv_heads)|num_query_groups", 2),
    (r".*(num_attention_heads|attention_heads|n_heads?|num_heads|resampler_heads)", 4),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"global_head_dim|qk_head_dim|mamba_d_head|mamba_headdim", 32),
    (r"head_dim|.*_head_dim|dim_head|kv_channels|d_kv|d_head|attention_head_size|resampler_dim_head", 16),
    (r"rotary_dim", 8),
    (r".*(lora_rank|_lowrank|adapter_rank|laurel_rank|gated_norm_rank)|d_rel", 32),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(prefix_)?dense_intermediate_size", 112),
    (r"(moe|expert)_?.*(intermediate|hidden)_size|shared_.*intermediate_size", 48),
    (r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|n_inner|d_ff|dff|dim_ff|mlp_dim|d_inner", 96),
    (r"feed_forward_size|.*ffn_size", 96),
    (r"state_size|mamba_d_state|ssm_state_size|time_step_rank|mamba_dt_rank", 16),
    (r"n_groups|mamba_n_groups|mamba_ngroups|num_mem_blocks", 1),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_chunk_size|chunk_size|block_size", 16),
    (r"hidden_size_per_layer_input|laurel_rank|router_hidden_size", 32),
    (r"(index|indexer)_(n_heads)", 4),
    (r"index_topk|indexer_budget", 8),
    (r"hc_mult|hc_count", 2),
    (
        r"(.*_)?hidden_size(_global)?|d_model|n_embd|(.*_)?emb(ed)?_dim|embedding_(dim|size)|word_embed_proj_dim",
        64,
    ),
    (r".*_embedding_size|dim_model_base|lru_width|projection_dim|text_hidden_size|input_size|output_dim", 64),
    (r"adapter_(in|out)_dim|projector_(in|out)put_dim|adapter_input_size|prompt_mid_dim", 64),
    (r"image_size|crop_size|resolution", 32),
    (r"(?!temporal)(.*_)?patch_size", 8),
    (r"num_patches|image_seq_length|num_image_tokens|mm_tokens_per_image|num_query_tokens", 16),
    (r"num_mel_bins|feature_size|input_feat_size", 16),
    (r"codebook_(size|dim)|num_embeddings", 32),
    (r"resampler_n(um)?_latents|latent_query_num", 4),
    (r"base_channels|latent_channels|num_filters|output_channels|.*conv_channels|.*_out_channel", 32),
)
# Fields whose default is None, where the model's class then lacks a size -> the value they get.
UNSET = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


def pairs() -> list[tuple[str, str]]:
    """(model type, class) of every model of text, and of text and images; each once."""
    from transformers.models.auto import modeling_auto as auto

    causal = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    both = list(causal.items()) + list(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    return list(dict.fromkeys(both))


def tiny_config(model_type: str, class_name: str) -> Any:
    """A small config from which the class can be built."""
    import transformers

    model_class = getattr(transformers, class_name)
    config = small(transformers.CONFIG_MAPPING[model_type], {})
    text = (config.sub_configs or {}).get("text_config")
    if text is not None and model_class.config_class is text:
        config = config.get_text_config()
    if class_name.endswith(("ForCausalLM", "LMHeadModel", "Decoder")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
        config.is_encoder_decoder = False
    config.architectures = [class_name]
    return config


def small(config_class: Any, given: dict[str, Any]) -> Any:
    """A config made small by the rules; `given` are values that differ from the defaults of its class."""
    default = config_class(**given)
    special = SPECIAL.get(config_class.model_type, {})
    names = _fields(config_class)
    parts = {k for k in (config_class.sub_configs or {}) if getattr(default, k, None) is not None}
    values: dict[str, Any] = dict(given)
    for number, name in enumerate(sorted(names - parts - {"dtype", "transformers_version"})):
        value = (
            UNSET.get(name) if _read(default, name) is None else _small(name, _read(default, name), number)
        )
        if value is not None:
            values[name] = value
    if "kv_lora_rank" in names and "num_key_value_heads" in names:  # attention with latent keys and values
        values["num_key_value_heads"] = 4
    values |= _layer_kinds(default, names)
    values |= {k: v for k, v in special.items() if k not in parts}
    for key in parts:
        specs = getattr(config_class, "sub_configs_defaults", {}).get(key)
        inner = small(type(getattr(default, key)), dict(specs.init_kwargs or {}) if specs else {})
        for name, value in special.get(key, {}).items():
            setattr(inner, name, value)
        values[key] = inner
    return config_class(**values)


def _fields(config_class: Any) -> set[str]:
    """The fields of a config; before transformers 5.4 configs are no dataclasses."""
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    named = inspect.signature(config_class.__init__).parameters.values()
    return {p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def _read(config: Any, name: str) -> Any:
    """A field of a config, as it is for the layers in general."""
    return vars(config).get((config.attribute_map or {}).get(name, name))


def _small(name: str, value: Any, number: int) -> Any:
    """The small value of a field; None where it stays."""
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _small_rope(value)
    whole = [value] if not isinstance(value, (list, tuple)) else list(value)
    if not whole or any(isinstance(v, bool) or not isinstance(v, int) for v in whole):
        return None
    fitting = next((v for pattern, v in RULES if re.fullmatch(pattern, name)), None)
    if fitting is None and re.fullmatch(r".*token_(id|index)", name):
        fitting = 200 + number % 50
    if fitting is None and len(whole) > 0 and whole is not value and isinstance(value, (list, tuple)):
        return [1] if re.fullmatch(r".*(_layers|_idxs|_ids|_indexes|_indices)", name) else None
    if fitting is None or not isinstance(value, (list, tuple)):
        return fitting
    return type(value)([fitting] * len(value))


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings for heads 16 wide."""
    changed = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if "mrope_section" in rope:
        whole = sum(rope["mrope_section"])
        half = int(8 * rope.get("partial_rotary_factor", 1.0))
        first = max(1, half * rope["mrope_section"][0] // whole)
        changed["mrope_section"] = [first, *_split(half - first, len(rope["mrope_section"]) - 1)]
    for key in ("long_factor", "short_factor"):
        if key in rope:
            changed[key] = [1.0] * int(8 * rope.get("partial_rotary_factor", 1.0))
    return changed


def _split(whole: int, parts: int) -> list[int]:
    return [whole // parts + (i < whole % parts) for i in range(parts)]


def _layer_kinds(default: Any, names: set[str]) -> dict[str, Any]:
    """The lists with an entry per layer, cut to one layer of every kind; and the number of layers."""
    count_names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
    counted = [n for n in count_names if isinstance(_read(default, n), int)]
    lists = {
        n: v
        for n in names
        if isinstance(v := _read(default, n), (list, tuple))
        and counted
        and len(v) == _read(default, counted[0])
        and n not in ("axial_pos_shape", "axial_pos_embds_dim")
    }
    if not lists:
        return {}
    kinds: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kinds.setdefault(kind, layer)
    chosen = list(kinds.values())[:6]
    chosen += [layer for layer in range(len(next(iter(lists.values())))) if layer not in chosen][
        : max(0, 2 - len(chosen))
    ]
    chosen.sort()
    short = {n: type(v)([v[layer] for layer in chosen]) for n, v in lists.items()}
    sizes = {n: v[:1] * len(chosen) for n in short if (v := _small(n, short[n], 0)) and len(v) == len(chosen)}
    short |= {n: v for n, v in sizes.items() if n.endswith("_size")}
    return short | {n: len(chosen) for n in counted if n in names}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH_KINDS = {"full_attention": _PLAIN, "sliding_attention": _PLAIN}
_IMAGE_WORD = {"vocabulary_map": {"<image>": 200, "<|extra_200|>": 201}}
_SHARED = {  # the last layers use the keys and values of earlier layers of their kind
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
_TWICE = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}  # a block used twice

# Model type -> what the rules do not get right. A value may also be of one of its parts (dict).
SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": _IMAGE_WORD,
    # Towers for images or sound must weigh less than the language model, as they do in the real models.
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "cohere_compass_text": {"rope_parameters": _BOTH_KINDS},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"global_head_dim": 32, "num_experts": 8, "top_k_experts": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "emu3": _IMAGE_WORD,
    "ernie4_5_vl_moe_text": {"rope_parameters": _mrope(3, 3, 2)},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "glm46v_text": {"rope_parameters": _mrope(2, 3, 3)},
    "glm4v_text": {"rope_parameters": _mrope(2, 3, 3)},
    "glm4v_moe_text": {"rope_parameters": _mrope(2, 1, 1) | {"partial_rotary_factor": 0.5}},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16, "qk_rope_head_dim": 0, "qk_head_dim": 16},
    "glm_ocr_text": {"rope_parameters": _mrope(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": {"rope_parameters": _mrope(2, 2, 2, 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1], "num_hidden_layers": 2, "layer_types": None},
    "longcat_flash": {"head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},  # the last one runs on text
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "muse_spark_audio": {"hidden_sizes": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "paddleocr_vl_text": {"rope_parameters": _mrope(2, 3, 3)},
    "phi4_multimodal_audio": {"num_blocks": 1, "intermediate_size": 16, "kernel_size": 3},
    "qwen2_5_omni_text": {"rope_parameters": _mrope(2, 3, 3)},
    "qwen2_5_vl_text": {"rope_parameters": _mrope(2, 3, 3)},
    "qwen2_vl_text": {"rope_parameters": _mrope(2, 3, 3)},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "step3p5": {"sliding_window": 16, "share_expert_dim": 48},
    "xmod": {"default_language": "en_XX"},
    "zamba": _TWICE | {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": _TWICE,
    "zaya": {"num_experts_per_tok": 1},
}
