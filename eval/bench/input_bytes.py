"""What rounding the inputs of a product to bytes costs: `input_bytes.py PACKED TEXT [--limit 50]`.

With int8 and int4 values and few rows the kernels round inputs, too. Perplexity with windows read 16 tokens
at a time, as decoding does, with packed layers and with the same weights in ordinary layers.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer

import llmprune
from llmprune.kernels import library

AT_ONCE = 16  # tokens: few enough for the fused kernels


def windows(folder, text, length, limit):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(Path(text).read_text(), return_tensors="pt")["input_ids"][0]
    return tokens[: length * limit].view(-1, length)


@torch.no_grad()
def perplexity(model, rows):
    """The mean loss over windows, each read AT_ONCE tokens at a time with a cache, exponentiated."""
    losses = []
    for row in rows:
        cache, total = None, 0.0
        for first in range(0, len(row), AT_ONCE):
            part = row[first : first + AT_ONCE]
            out = model(part[None], past_key_values=cache, use_cache=True)
            cache, wanted = out.past_key_values, row[first + 1 : first + AT_ONCE + 1]
            logits = out.logits[0, : len(wanted)].float()
            total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        losses.append(total / (len(row) - 1))
    return math.exp(sum(losses) / len(losses))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=200)
    arguments = parser.parse_args()
    rows = windows(arguments.folder, arguments.text, arguments.seqlen, arguments.limit)
    print(library.status())
    for name, dequantize in (("packed layers, inputs in bytes", False), ("ordinary layers", True)):
        model = llmprune.load(arguments.folder, dequantize=dequantize).eval()
        print(f"{name}: {perplexity(model, rows):.4f}", flush=True)


if __name__ == "__main__":
    main()
