"""Writes a Llama checkpoint of any size with random weights, sharded, bfloat16: `make_model.py FOLDER` is
7B-shaped (13.5 GB).

With `--experts` it is a Qwen3 mixture of experts, a file per shard and tensors per expert: `make_model.py
FOLDER --experts 128 --blocks 2 --width 2048 --intermediate 768 --heads 32 --vocabulary 151936` has two blocks
of the shape of Qwen3-30B-A3B.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from llmprune.checkpoint.files import save_tensors
from llmprune.hub.download import demo_folder

HEAD = 128  # width of a head of the mixture of experts


def block(config, generator):
    """The tensors of one block, by their names below `model.layers.N.`."""
    d, m, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size // config.num_attention_heads * config.num_key_value_heads,
    )
    attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    experts = getattr(config, "num_experts", 0)
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if experts:
        wide, narrow = config.num_attention_heads * HEAD, config.num_key_value_heads * HEAD
        attention = {"q_proj": (wide, d), "k_proj": (narrow, d), "v_proj": (narrow, d), "o_proj": (d, wide)}
        norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
    mlps = [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]
    shapes = {f"self_attn.{n}.weight": s for n, s in attention.items()}
    shapes |= {"mlp.gate.weight": (experts, d)} if experts else {}
    for mlp in mlps:
        shapes |= {
            f"{mlp}.{n}_proj.weight": s for n, s in (("gate", (m, d)), ("up", (m, d)), ("down", (d, m)))
        }
    tensors = {name: matrix(*shape, generator) for name, shape in shapes.items()}
    return tensors | {f"{n}.weight": torch.ones(size, dtype=torch.bfloat16) for n, size in norms.items()}


def config_of(arguments):
    shared = {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.width,
        "num_hidden_layers": arguments.blocks,
        "num_attention_heads": arguments.heads,
        "max_position_embeddings": 2048,
        "dtype": torch.bfloat16,
    }
    if not arguments.experts:
        return LlamaConfig(
            **shared,
            intermediate_size=arguments.intermediate,
            num_key_value_heads=arguments.kv_heads or arguments.heads,
            architectures=["LlamaForCausalLM"],
        )
    return Qwen3MoeConfig(
        **shared,
        num_experts=arguments.experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        moe_intermediate_size=arguments.intermediate,
        intermediate_size=arguments.intermediate,
        num_key_value_heads=max(1, arguments.heads // 8),
        head_dim=HEAD,
        architectures=["Qwen3MoeForCausalLM"],
    )


def matrix(rows, columns, generator):
    return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=0, help="heads of keys and values; 0 for as many")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0)
    arguments = parser.parse_args()
    config = config_of(arguments)
    arguments.folder.mkdir(parents=True)
    config.save_pretrained(arguments.folder)
    for file in demo_folder().glob("tokenizer*"):  # its 2048 tokens are ids of the larger vocabulary too
        (arguments.folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    where, total = {}, 0
    for number in range(arguments.blocks + 1):
        if number < arguments.blocks:
            tensors = {f"model.layers.{number}.{n}": t for n, t in block(config, generator).items()}
        else:
            v, d = arguments.vocabulary, arguments.width
            tensors = {
                "model.embed_tokens.weight": matrix(v, d, generator),
                "lm_head.weight": matrix(v, d, generator),
            }
            tensors["model.norm.weight"] = torch.ones(d, dtype=torch.bfloat16)
        name = f"model-{number + 1:05d}-of-{arguments.blocks + 1:05d}.safetensors"
        save_tensors(arguments.folder / name, tensors)
        where |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (arguments.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{arguments.folder}: {total / 1e9:.2f} GB, {arguments.blocks} blocks")


if __name__ == "__main__":
    main()
