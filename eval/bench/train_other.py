"""Trains a small model of another kind than the demo's, for measurements on a model nothing was tuned on:
`train_other.py --output FOLDER`.

OPT's architecture (learned positions, LayerNorm, biases, ReLU, no gate), the demo's training text and recipe;
600 steps take two CPU cores about a quarter of an hour. With `--experts 8` a Mixtral of so many experts, two
per token, kept in use by the usual loss on their balance. It is not compiled: an expert never gets the same
number of tokens twice.
"""

import argparse
import functools
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from llmprune.demo import train

BALANCE = 0.02  # weight of the loss on the balance of experts


def build(vocabulary):
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            ffn_dim=768,
            num_hidden_layers=6,
            num_attention_heads=6,
            word_embed_proj_dim=192,
            max_position_embeddings=train.SEQUENCE,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_experts(experts, vocabulary):
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=train.SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return MixtralForCausalLM(config)


def balanced_loss(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch[:, :-1], output_router_logits=model.training)
    loss = cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
    return loss + BALANCE * out.aux_loss if model.training else loss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0)
    arguments = parser.parse_args()
    train.build = build
    if arguments.experts:
        train.build = functools.partial(build_experts, arguments.experts)
        train.batch_loss = balanced_loss
    train.train(arguments.steps, 32, 2048, arguments.seed, arguments.output, not arguments.experts)


if __name__ == "__main__":
    main()
