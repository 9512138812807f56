"""What pruning costs, by recipe and amount.

`quality.py MODEL TEXT --calibration SOURCE --recipes wanda best --amounts 0.5 2:4`.

The gap of a pruned model is `ln(perplexity pruned) - ln(perplexity dense)` on TEXT; its share is of the gap
of the first recipe named (or of --reference, a results.json as the reference folder has it). A recipe is a
name or a file, with overrides after `?`: `best?update=none`, `wanda?refiner=swaps&order=group`.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import llmprune
from llmprune.recipe.loading import parse_assignment


def scores_of(folder, arguments):
    """Perplexity, and the accuracy on the task (None where none was asked for)."""
    scores = llmprune.evaluate(
        folder,
        perplexity=[arguments.text],
        eval_seqlen=arguments.seqlen,
        limit=arguments.limit,
        dtype=arguments.dtype,
    )
    accuracy = None
    if arguments.task:
        found = llmprune.evaluate(
            folder,
            tasks=[arguments.task],
            task_data=arguments.task_data,
            limit=arguments.task_limit,
            dtype=arguments.dtype,
        )
        accuracy = found["tasks"][arguments.task]["acc"]["value"]
    return next(iter(scores["perplexity"].values()))["value"], accuracy


def pruned(label, amount, arguments):
    """Scores, seconds of pruning, and sparsity of one recipe at one amount."""
    recipe, _, overrides = label.partition("?")
    settings = dict(parse_assignment(text) for text in overrides.split("&") if text)
    options = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    with tempfile.TemporaryDirectory() as out:
        run = llmprune.prune(
            arguments.model,
            recipe=recipe,
            settings=settings,
            calibration=arguments.calibration,
            dtype=arguments.dtype,
            output=f"{out}/model",
            **options,
        )
        totals = run.record["totals"]
        return scores_of(f"{out}/model", arguments), totals["seconds"]["total"], totals["sparsity"]


def _cell(accuracy):
    return "" if accuracy is None else f" | accuracy {accuracy:.4f}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--recipes", nargs="+", default=["wanda", "sparsegpt", "best"])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "2:4", "4:8"])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", help="a task whose accuracy is shown too, such as blimp_local")
    parser.add_argument("--task-data")
    parser.add_argument("--task-limit", type=int, default=6700)
    parser.add_argument(
        "--reference",
        type=Path,
        help="results.json with published gaps to divide by, for wanda and sparsegpt",
    )
    arguments = parser.parse_args()
    dense, accuracy = scores_of(arguments.model, arguments)
    print(f"dense: {dense:.4f}{_cell(accuracy)}\n")
    print("| amount | recipe | perplexity | gap | share of wanda | of sparsegpt | sparsity | seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    published = json.loads(arguments.reference.read_text())["results"] if arguments.reference else {}
    for amount in arguments.amounts:
        gaps = {
            m: math.log(published[f"{m}-{amount}"]["perplexity"] / dense)
            for m in ("wanda", "sparsegpt")
            if f"{m}-{amount}" in published
        }
        for label in arguments.recipes:
            (value, accuracy), seconds, sparsity = pruned(label, amount, arguments)
            gap = math.log(value / dense)
            gaps.setdefault(label, gap)
            shares = " | ".join(f"{gap / gaps[m]:.3f}" if m in gaps else "" for m in ("wanda", "sparsegpt"))
            print(
                f"| {amount} | {label} | {value:.4f} | {gap:.4f} | {shares} | {sparsity:.6f} | "
                f"{seconds:.0f}{_cell(accuracy)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
