"""A checkpoint larger than the memory it is given: peak memory and time of pruning and scoring at 8, 16 and
32 blocks, against the plan.

`large.py FOLDER [--blocks 8 16 32]` writes 7B-shaped checkpoints of random weights below FOLDER (13.5 GB and
as much output at 32 blocks).
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

MAKE = Path(__file__).with_name("make_model.py")


def program(*arguments):
    """The program's summary, and the seconds it took."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llmprune", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout), time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--recipe", default="dsnot")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    arguments = parser.parse_args()
    for blocks in arguments.blocks:
        model, output = arguments.folder / f"random-{blocks}", arguments.folder / f"pruned-{blocks}"
        if not model.exists():
            subprocess.run(
                [sys.executable, MAKE, model, "--blocks", str(blocks)], check=True, capture_output=True
            )
        options = (
            model,
            "--sparsity",
            "0.6",
            "--recipe",
            arguments.recipe,
            "--samples",
            "8",
            "--seqlen",
            "512",
            "--output",
            output,
        )
        planned, _ = program("prune", *options, "--dry-run")
        record, seconds = program("prune", *options, "--overwrite", "--restart")
        totals = record["totals"]
        private = totals["peak_private_memory_bytes"]
        print(
            f"{blocks} blocks, {totals['bytes']['dense'] / 1e9:.2f} GB: {seconds:.0f} s; "
            f"peak {private / 1e9:.2f} GB private, "
            f"{totals['peak_memory_bytes'] / 1e9:.2f} GB with file pages; "
            f"planned {planned['memory_bytes'] / 1e9:.2f} GB "
            f"({planned['memory_bytes'] / private - 1:+.0%})",
            flush=True,
        )
        phases = {k: v for k, v in totals["seconds"].items() if k != "total"}
        print(
            "  "
            + ", ".join(f"{k} {v:.1f} s ({v / totals['seconds']['total']:.0%})" for k, v in phases.items()),
            flush=True,
        )
        text = ("--perplexity", "builtin", "--eval-seqlen", "512", "--limit", "16")
        scoring, _ = program("run", *options, *text, "--dry-run")
        scores, seconds = program("eval", output, *text)
        print(
            f"  perplexity of 16 windows of 512: {seconds:.0f} s; "
            f"peak {scores['peak_private_memory_bytes'] / 1e9:.2f} GB private, "
            f"{scores['peak_memory_bytes'] / 1e9:.2f} GB with file pages; "
            f"planned {scoring['scoring_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        if not arguments.keep:
            shutil.rmtree(model)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
