"""`llmprune prune` end to end against the flow of the papers' code: the whole model in memory, one sample at
a time, statistics per matrix, two passes per block, masks by full sorts.

`published.py MODEL TOKENS.safetensors`. Theirs counts loading, passes and pruning, in float32 as their code
does; ours counts all of the record's seconds, reading and writing too. Imports count on neither side.
"""

import argparse
import tempfile
import time

import dsnot
import sparsegpt
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.contracts import InputStats, Need


class Seen:
    """The inputs of one matrix, added up sample by sample."""

    def __init__(self, module, second_order):
        self.module, self.second_order, self.tokens = module, second_order, 0
        columns = module.in_features
        self.squares, self.sums, self.within = (
            torch.zeros(columns),
            torch.zeros(columns),
            torch.zeros(columns),
        )
        self.gram = torch.zeros(columns, columns) if second_order else None

    def __call__(self, module, inputs):
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self.tokens += len(x)
        if self.second_order:
            self.gram += x.T @ x
        else:
            self.squares += x.square().sum(0)
            self.sums += x.sum(0)
            self.within += len(x) * x.var(0, unbiased=False)

    def prune(self, method, sparsity):
        weight = self.module.weight.data
        if method == "sparsegpt":
            self.module.weight.data = sparsegpt.plain(weight, self.gram / self.tokens, sparsity)
            return
        values = {
            Need.MEAN: self.sums / self.tokens,
            Need.SECOND_MOMENT: self.squares / self.tokens,
            Need.WITHIN_VARIANCE: self.within / self.tokens,
        }
        score = weight.abs() * values[Need.SECOND_MOMENT].sqrt()
        order = torch.sort(score, dim=1, stable=True).indices[:, : int(score.shape[1] * sparsity)]
        keep = torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
        if method == "dsnot":
            keep = dsnot.plain(weight, keep, InputStats(self.tokens, 256, values))
        self.module.weight.data = weight * keep


@torch.no_grad()
def published(folder, tokens, method, sparsity):
    """Seconds of the published flow, and the pruned model."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, hidden, arguments = model.model.layers, [], {}

    def catch(module, args, kwargs):
        hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        arguments.update(kwargs)
        raise StopIteration

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in tokens:
        try:
            model(row[None], use_cache=False)
        except StopIteration:
            pass
    handle.remove()
    for layer in layers:
        matrices = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        seen = [Seen(m, method == "sparsegpt") for m in matrices]
        handles = [m.register_forward_pre_hook(s) for m, s in zip(matrices, seen, strict=True)]
        for sample in hidden:
            layer(sample, **arguments)
        for handle in handles:
            handle.remove()
        for statistics in seen:
            statistics.prune(method, sparsity)
        hidden = [layer(sample, **arguments) for sample in hidden]
    return time.perf_counter() - started, model


def ours(folder, path, method, sparsity, dtype, order):
    """The record's seconds, and the pruned model."""
    recipe = {"dsnot": "dsnot-paper", "alps": "sparsegpt"}.get(method, method)
    settings = {"order": order} | {"dsnot": {"refiner.targets": ["*"]}, "alps": {"pruner": "alps"}}.get(
        method, {}
    )
    with tempfile.TemporaryDirectory() as out:
        run = llmprune.prune(
            folder,
            recipe=recipe,
            sparsity=sparsity,
            calibration=path,
            dtype=dtype,
            settings=settings,
            output=f"{out}/m",
        )
        return run.record["totals"]["seconds"]["total"], llmprune.load(f"{out}/m").float()


def agreement(a, b):
    """The share of mask entries that agree."""
    pairs = [
        (x, y)
        for (n, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True)
        if "proj" in n
    ]
    return sum(int(((x != 0) == (y != 0)).sum()) for x, y in pairs) / sum(x.numel() for x, _ in pairs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["wanda", "dsnot", "sparsegpt"])
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)["tokens"]
    print(
        "| | published flow, float32 | " + " | ".join(f"ours, {label}" for label, *_ in SIDES) + " |",
        flush=True,
    )
    print("|---" * (len(SIDES) + 2) + "|", flush=True)
    for method in arguments.methods:
        theirs, cells, fastest = [], [], [float("inf")] * len(SIDES)
        agreed = [0.0] * len(SIDES)
        for _ in range(arguments.repeats):
            seconds, model = published(arguments.model, tokens, method, arguments.sparsity)
            theirs.append(seconds)
            for i, (_, dtype, order) in enumerate(SIDES):
                seconds, pruned = ours(
                    arguments.model, arguments.tokens, method, arguments.sparsity, dtype, order
                )
                fastest[i], agreed[i] = min(fastest[i], seconds), agreement(model, pruned)
        for seconds, agrees in zip(fastest, agreed, strict=True):
            cells.append(
                f"{seconds:.2f} s, {min(theirs) / seconds:.1f} times faster, masks agree {agrees:.2%}"
            )
        print(f"| {method} | {min(theirs):.2f} s | {' | '.join(cells)} |", flush=True)
    times = {
        method: min(
            ours(arguments.model, arguments.tokens, method, arguments.sparsity, "float32", "block")[0]
            for _ in range(2)
        )
        for method in ("sparsegpt", "alps")
    }
    print(
        f"\nsparsegpt {times['sparsegpt']:.2f} s, alps {times['alps']:.2f} s: "
        f"{times['alps'] / times['sparsegpt']:.1f} times as long"
    )


SIDES = (
    ("float32", "float32", "block"),
    ("bfloat16", "bfloat16", "block"),
    ("bfloat16, order group", "bfloat16", "group"),
)


if __name__ == "__main__":
    main()
