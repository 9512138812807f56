"""How far masks depend on the number of threads: `threads.py MODEL TOKENS.safetensors` prunes with one thread
and with two and compares.

Sums run in another order, nothing else differs; what that moves is the share of mask entries that do not
agree.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import llmprune

METHODS = {
    "wanda": {},
    "ria": {"pruner": "ria"},
    "dsnot": {"refiner": "dsnot"},
    "swaps": {"refiner": "swaps"},
    "sparsegpt-saliency": {"pruner": "sparsegpt-saliency"},
    "sparsegpt": {"pruner": "sparsegpt"},
    "alps": {"pruner": "alps"},
    "alps, order group, correction 0.25": {
        "pruner.name": "alps",
        "pruner.correction": 0.25,
        "order": "group",
    },
}


def masks(arguments, settings, threads, out):
    torch.set_num_threads(threads)
    llmprune.prune(
        arguments.model,
        recipe="wanda",
        sparsity=arguments.sparsity,
        settings=settings,
        calibration=arguments.tokens,
        dtype=arguments.dtype,
        output=out,
    )
    return load_file(Path(out) / "masks.safetensors")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    print("| method | all blocks | first block | last block |\n|---|---|---|---|", flush=True)
    for label, settings in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            one, two = (masks(arguments, settings, n, f"{folder}/{n}") for n in (1, 2))
        # Packed bits: the matrices' widths are multiples of eight, so every bit is an entry.
        differ = {
            name: sum(bin(b).count("1") for b in (one[name] ^ two[name]).flatten().tolist()) for name in one
        }
        sizes = {name: one[name].numel() * 8 for name in one}
        blocks = [int(part) for name in one for part in name.split(".") if part.isdigit()]

        def agreed(block=None, differ=differ, sizes=sizes):
            names = [n for n in differ if block is None or f".{block}." in n]
            return f"{1 - sum(differ[n] for n in names) / sum(sizes[n] for n in names):.4%}"

        print(f"| {label} | {agreed()} | {agreed(min(blocks))} | {agreed(max(blocks))} |", flush=True)


if __name__ == "__main__":
    main()
