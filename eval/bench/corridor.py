"""The whole run against its bare forward passes: same tokens, same dtype, two passes per block and nothing
else.

`corridor.py MODEL TOKENS.safetensors [--dtype float32 bfloat16]`. The run's seconds are those of its record:
reading, forwards, statistics, pruning, writing, without imports and plan.
"""

import argparse
import tempfile
import time

from safetensors.torch import load_file

import llmprune
from llmprune.model.activations import BlockInputs
from llmprune.model.opening import OpenOptions, open_model


def bare(model, tokens, dtype):
    """Seconds of two forward passes per block over all tokens."""
    skeleton = open_model(model, OpenOptions(dtype=dtype)).skeleton
    inputs, seconds = BlockInputs(skeleton, tokens, skeleton.device), 0.0
    for number, name in enumerate(skeleton.blocks):
        names = skeleton.parameters_of(name)
        skeleton.load(names)
        started = time.perf_counter()
        inputs.each(lambda part, number=number: inputs.run(number, part, {}), lambda: None)
        inputs.forward(number)
        seconds += time.perf_counter() - started
        skeleton.free(names)
    return seconds


def whole(model, path, dtype, recipe):
    """The record's seconds by phase, of a run at 60 %."""
    with tempfile.TemporaryDirectory() as folder:
        run = llmprune.prune(
            model, recipe=recipe, sparsity=0.6, calibration=path, dtype=dtype, output=f"{folder}/out"
        )
    return run.record["totals"]["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--recipes", nargs="+", default=["wanda", "dsnot", "sparsegpt"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)["tokens"]
    for dtype in arguments.dtype:
        best = min(bare(arguments.model, tokens, dtype) for _ in range(arguments.repeats))
        print(f"{dtype}: bare forward passes {best:.2f} s", flush=True)
        for recipe in arguments.recipes:
            runs = (whole(arguments.model, arguments.tokens, dtype, recipe) for _ in range(arguments.repeats))
            seconds = min(runs, key=lambda s: s["total"])
            phases = ", ".join(f"{k} {v:.2f}" for k, v in seconds.items() if k != "total")
            print(
                f"  {recipe:<10} {seconds['total']:.2f} s ({phases}): "
                f"{seconds['total'] / best:.2f} times the bare passes",
                flush=True,
            )


if __name__ == "__main__":
    main()
