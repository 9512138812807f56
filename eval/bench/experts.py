"""What the statistics of experts' matrices should be of: `experts.py MODEL TEXT --calibration SOURCE`.

Each recipe is run with the tokens routed to an expert and with all tokens (`experts.tokens`). Printed are
both perplexities on TEXT, and how much of the keep masks of experts' matrices differs between the two.
"""

import argparse
import tempfile
from pathlib import Path

from quality import scores_of
from safetensors.torch import load_file

import llmprune
from llmprune.checkpoint.contents import MASKS


def pruned(recipe, amount, tokens, folder, arguments):
    """Perplexity, the masks and the rows of the record of one run."""
    options = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    run = llmprune.prune(
        arguments.model,
        recipe=recipe,
        settings={"experts.tokens": tokens},
        calibration=arguments.calibration,
        dtype=arguments.dtype,
        output=folder,
        **options,
    )
    return scores_of(folder, arguments)[0], load_file(folder / MASKS), run.record


def difference(one, other, names):
    """The share of entries in which two sets of packed masks differ."""
    differing = sum(bin(byte).count("1") for n in names for byte in (one[n] ^ other[n]).flatten().tolist())
    return differing / sum(8 * one[n].numel() for n in names)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--recipes", nargs="+", default=["wanda", "sparsegpt", "best"])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.6", "0.7", "2:4"])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    arguments.task = None
    print(f"dense: {scores_of(arguments.model, arguments)[0]:.3f}\n")
    print("| amount | recipe | routed tokens | all tokens | masks that differ | fewest tokens of an expert |")
    print("|---|---|---|---|---|---|", flush=True)
    for amount in arguments.amounts:
        for recipe in arguments.recipes:
            with tempfile.TemporaryDirectory() as out:
                routed, one, record = pruned(recipe, amount, "routed", Path(out) / "routed", arguments)
                everything, other, _ = pruned(recipe, amount, "all", Path(out) / "all", arguments)
            tokens = {row["name"]: row["tokens"] for row in record["matrices"] if "tokens" in row}
            print(
                f"| {amount} | {recipe} | {routed:.3f} | {everything:.3f} | "
                f"{difference(one, other, tokens):.1%} | {min(tokens.values())} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
