"""What every shipped recipe and method costs and gives, as YAML.

`costs.py MODEL TEXT TOKENS > eval/results/costs.yaml`:

- time: processor time of the run at 70 %, with wanda's as 1; a busy machine hardly stretches it.
- memory: what the plan predicts for a 7B Llama in bfloat16 on a CPU, 128 rows of 2048 tokens, block inputs in
  RAM; nothing is run.
- perplexity: on TEXT, first 200 windows of 256 tokens, at 50 and 70 %, calibrated on TOKENS, everything in
  float32.

Refiners, updates and allocators are measured on Wanda, pruners alone. `--memory` prints the memory alone, in
a second.
"""

import argparse
import functools
import sys
import tempfile
import time

import torch
import yaml
from transformers import LlamaConfig

import llmprune
from llmprune import registry
from llmprune.checkpoint.reader import TensorInfo
from llmprune.common.shipped import shipped_names
from llmprune.model.skeleton import Skeleton
from llmprune.planning.plan import make_plan
from llmprune.recipe import loading as recipes

AMOUNTS = (0.5, 0.7)
ON_WANDA = {"pruners": "pruner", "refiners": "refiner", "updates": "update", "allocators": "allocator"}


class Shapes:
    """A checkpoint that has shapes and no weights."""

    def __init__(self, config):
        with torch.device("meta"):
            from transformers import LlamaForCausalLM

            names = LlamaForCausalLM(config).state_dict()
        self.tensors = {
            n: TensorInfo(tuple(t.shape), torch.bfloat16, 2 * t.numel()) for n, t in names.items()
        }


@functools.cache
def seven_billion():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    return Skeleton(config, Shapes(config), torch.bfloat16, torch.device("cpu"))


def memory(name, **overrides):
    """Gigabytes the plan predicts for a 7B model."""
    plan = make_plan(recipes.load(name, overrides), seven_billion(), 128, 2048)
    return round(plan.memory / 1e9, 1)


def entries():
    """(where it belongs, recipe, overrides) of everything there is; `explicit` has nothing to measure without
    a user's numbers.
    """
    for name in shipped_names("recipes"):
        yield ("recipes", name), name, {}
    for room, key in ON_WANDA.items():
        for name in registry.names(room):
            if (room, name) != ("allocators", "explicit"):
                yield (room, name), "wanda", {key: name}


def measured(arguments, recipe, overrides):
    """Processor seconds of the run at the last amount, and the perplexity at each."""
    found = {}
    for amount in AMOUNTS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            llmprune.prune(
                arguments.model,
                recipe=recipe,
                settings=overrides,
                sparsity=amount,
                calibration=arguments.tokens,
                dtype="float32",
                output=f"{folder}/out",
            )
            seconds = time.process_time() - started
            options = {"eval_seqlen": 256, "limit": 200, "dtype": "float32"}
            scores = llmprune.evaluate(f"{folder}/out", perplexity=[arguments.text], **options)
            found[amount] = round(next(iter(scores["perplexity"].values()))["value"], 2)
    return seconds, found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("tokens", nargs="?")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    made, seconds = {}, {}
    if not arguments.memory:
        measured(arguments, "wanda", {})  # imports what all of them need
    for place, recipe, overrides in entries():
        entry = {"memory": memory(recipe, **overrides)}
        if not arguments.memory:
            seconds[place], perplexity = measured(arguments, recipe, overrides)
            entry["perplexity"] = perplexity
        print(*place, seconds.get(place), entry, file=sys.stderr, flush=True)
        made.setdefault(place[0], {})[place[1]] = entry
    wanda = [seconds[place] for place in (("recipes", "wanda"), ("pruners", "wanda")) if seconds]
    for (room, name), took in seconds.items():
        made[room][name] = {"time": float(f"{took * len(wanda) / sum(wanda):.2g}"), **made[room][name]}
    print(yaml.safe_dump(made, sort_keys=False, default_flow_style=None), end="")


if __name__ == "__main__":
    main()
