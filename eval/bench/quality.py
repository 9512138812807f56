"""What pruning costs, by recipe and amount: `quality.py MODEL TEXT --calibration SOURCE --recipes wanda best --amounts 0.5 2:4`.

The gap of a pruned model is `ln(perplexity pruned) - ln(perplexity dense)` on TEXT; its share is of the gap of the first recipe named
(or of --reference, a results.json as the reference folder has it). A recipe is a name or a file, with overrides after `?`:
`best?update=none`, `wanda?refiner=swaps&order=group`.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import llmprune
from llmprune.recipe import parse_assignment


def perplexity_of(folder, arguments):
    scores = llmprune.evaluate(
        folder, perplexity=[arguments.text], eval_seqlen=arguments.seqlen, limit=arguments.limit, dtype=arguments.dtype
    )
    return next(iter(scores["perplexity"].values()))["value"]


def pruned(label, amount, arguments):
    """Perplexity, seconds of pruning, and sparsity of one recipe at one amount."""
    recipe, _, overrides = label.partition("?")
    settings = dict(parse_assignment(text) for text in overrides.split("&") if text)
    options = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    with tempfile.TemporaryDirectory() as out:
        run = llmprune.prune(
            arguments.model, recipe=recipe, settings=settings, calibration=arguments.calibration, dtype=arguments.dtype,
            output=f"{out}/model", **options,
        )  # fmt: skip
        totals = run.record["totals"]
        return perplexity_of(f"{out}/model", arguments), totals["seconds"]["total"], totals["sparsity"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--recipes", nargs="+", default=["wanda", "sparsegpt", "best"])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "2:4", "4:8"])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reference", type=Path, help="results.json with published gaps to divide by, for wanda and sparsegpt")
    arguments = parser.parse_args()
    dense = perplexity_of(arguments.model, arguments)
    print(f"dense: {dense:.4f}\n\n| amount | recipe | perplexity | gap | share of wanda | of sparsegpt | sparsity | seconds |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    published = json.loads(arguments.reference.read_text())["results"] if arguments.reference else {}
    for amount in arguments.amounts:
        gaps = {
            m: math.log(published[f"{m}-{amount}"]["perplexity"] / dense) for m in ("wanda", "sparsegpt") if f"{m}-{amount}" in published
        }
        for label in arguments.recipes:
            value, seconds, sparsity = pruned(label, amount, arguments)
            gap = math.log(value / dense)
            gaps.setdefault(label, gap)
            shares = " | ".join(f"{gap / gaps[m]:.3f}" if m in gaps else "" for m in ("wanda", "sparsegpt"))
            print(f"| {amount} | {label} | {value:.4f} | {gap:.4f} | {shares} | {sparsity:.6f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
