"""Trains a small model of another kind than the demo's, for measurements on a model nothing was tuned on:
`train_other.py --output FOLDER`.

OPT's architecture (learned positions, LayerNorm, biases, ReLU, no gate), the demo's training text and recipe;
600 steps take two CPU cores about a quarter of an hour. With `--experts 8` a Mixtral of so many experts, two
per token, whose router learns from its part in the outputs alone.
"""

import argparse
import functools
from pathlib import Path

from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from llmprune.demo import train


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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0)
    arguments = parser.parse_args()
    train.build = functools.partial(build_experts, arguments.experts) if arguments.experts else build
    train.train(arguments.steps, 32, 2048, arguments.seed, arguments.output)


if __name__ == "__main__":
    main()
