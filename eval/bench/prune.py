"""Seconds and peak memory of `llmprune prune MODEL --sparsity 0.7` for each recipe, each in a process of its
own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

RECIPES = ("magnitude", "wanda", "sparsegpt", "dsnot")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("options", nargs="*", help="more options of llmprune prune, after --")
    arguments = parser.parse_args()
    print(
        f"{arguments.model}: seconds of the whole command / of the run itself (forwards, pruning) / "
        "peak resident memory"
    )
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "llmprune",
                "prune",
                arguments.model,
                "--sparsity",
                "0.7",
                "--recipe",
                recipe,
            ]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--output", f"{folder}/out", "--json", *arguments.options],
                capture_output=True,
                text=True,
                check=True,
            )
            whole = time.perf_counter() - started
        totals = json.loads(done.stdout)["totals"]
        seconds = totals["seconds"]
        print(
            f"{recipe:<10} {whole:5.1f} s / {seconds['total']:5.1f} s (forward "
            f"{seconds['forward']:.1f}, prune {seconds['prune']:.1f})"
            f" / {totals['peak_memory_bytes'] / 1e6:.0f} MB, sparsity {totals['sparsity']:.4f}"
        )


if __name__ == "__main__":
    main()
