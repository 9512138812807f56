"""Perplexity on one text after pruning with calibration rows of several sources and sizes: a table, source x
rows, for each recipe.
"""

import argparse
import json
import sys
import tempfile
import time

import transformers

import llmprune


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", help="text to measure perplexity on: builtin, wikitext2, c4 or a file")
    parser.add_argument("--sources", nargs="+", default=["builtin", "self", "builtin=0.5+self=0.5"])
    parser.add_argument("--samples", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--recipes", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="mean, and the range where there are several"
    )
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--limit", type=int, help="windows of the text")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        help="recipe fields for sources with self, such as calibration.temperature=0.8",
    )
    parser.add_argument("--json", help="file for one line per run")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    dense = perplexity(arguments, arguments.model)
    print(
        f"{arguments.model}, sparsity {arguments.sparsity}, seeds {arguments.seeds}: "
        f"perplexity on {arguments.text}, dense {dense:.4f}"
    )
    for recipe in arguments.recipes:
        print(f"\n{f'{recipe}, rows:':<32}" + "".join(f"{samples:>28}" for samples in arguments.samples))
        for source in arguments.sources:
            print(f"{source:<32}", end="", flush=True)
            for samples in arguments.samples:
                values = [measured(arguments, recipe, source, samples, seed) for seed in arguments.seeds]
                spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
                print(f"{f'{sum(values) / len(values):.4f}{spread}':>28}", end="", flush=True)
            print()


def perplexity(arguments, folder):
    scores = llmprune.evaluate(
        folder, perplexity=[arguments.text], eval_seqlen=arguments.seqlen, limit=arguments.limit
    )
    return next(iter(scores["perplexity"].values()))["value"]


def measured(arguments, recipe, source, samples, seed):
    """Perplexity of one pruned model; `--json` keeps its calibration record and times."""
    from llmprune.recipe.loading import parse_assignment

    settings = dict(map(parse_assignment, arguments.set)) if "self" in source else {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record = llmprune.prune(
            arguments.model,
            recipe=recipe,
            sparsity=arguments.sparsity,
            calibration=source,
            samples=samples,
            seqlen=arguments.seqlen,
            seed=seed,
            settings=settings,
            output=f"{folder}/out",
        ).record
        seconds, value = time.perf_counter() - started, perplexity(arguments, f"{folder}/out")
    if arguments.json:
        run = {
            "recipe": recipe,
            "perplexity": value,
            "seconds": seconds,
            "calibration": record["calibration"],
            "command": sys.argv,
        }
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
    return value


if __name__ == "__main__":
    main()
