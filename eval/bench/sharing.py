"""What it gives that packed layers with the same input share one product: `sharing.py PACKED_FOLDER`.

Milliseconds of a token, medians; sharing is on and off in turns in one loaded model.
"""

import argparse
import statistics
import time

import torch

import llmprune
from llmprune.runtime.layers import PackedLinear

PROMPT, TOKENS, ROUNDS = 8, 10, 8


@torch.no_grad()
def seconds(model, prompt):
    """Of each token but the first two."""
    out, times = model(prompt, use_cache=True), []
    for _ in range(TOKENS):
        token, started = out.logits[:, -1:].argmax(-1), time.perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - started)
    return times[2:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    model = llmprune.load(parser.parse_args().folder).eval()
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    own = [layer.together for layer in layers]
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    found = {True: [], False: []}
    for number in range(ROUNDS):
        for shared in found:
            for layer, together in zip(layers, own, strict=True):
                layer.together = together if shared else None
            times = seconds(model, prompt)
            found[shared] += times if number else []  # the first round warms up
    for shared, times in found.items():
        print(f"{'shared' if shared else 'separate'}: {statistics.median(times) * 1e3:.2f} ms per token")


if __name__ == "__main__":
    main()
