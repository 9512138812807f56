"""A sweep against its cells run one by one: `python eval/bench/sweep.py FOLDER --model DIR --calibration FILE
--perplexity FILE` (english-8m with 3 x 3 cells: 40 minutes of a core).

Both are commands in processes of their own, one after the other, each side with its own empty cache.
`ratio` is the sweep's seconds over the sum of the runs'; `same` says that every cell has the perplexity,
masks and weights of its run. The runs write no texts, as cells do not. What is there already in
FOLDER/rows.jsonl is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def timed(arguments: list[str], folder: Path) -> dict[str, float]:
    """Run `llmprune` with these arguments: seconds by the clock and of processors."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "NO_COLOR": "1"}
    started, before = time.monotonic(), os.times()
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "llmprune", *arguments]
        subprocess.run(command, env=environment, check=True, stdout=log, stderr=log)
    after = os.times()
    processors = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(time.monotonic() - started, 1), "processor_seconds": round(processors, 1)}


def found(folder: Path) -> dict[str, Any]:
    """What a cell and its run must have in common: scores, masks and weights."""
    evaluation = json.loads((folder / "llmprune.json").read_text())["evaluation"]
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    return {"evaluation": evaluation, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--perplexity", default="builtin")
    parser.add_argument("--recipes", default="wanda,sparsegpt,best")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    arguments = parser.parse_args()
    texts = ["--calibration", arguments.calibration, "--perplexity", arguments.perplexity, "--quiet"]
    file = arguments.folder / "rows.jsonl"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known = {}
    if file.is_file():
        known = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())}

    def measure(name: str, command: list[str]) -> None:
        if name not in known:
            cache = arguments.folder / ("cache-sweep" if name == "sweep" else "cache-runs")
            cache.mkdir(exist_ok=True)
            known[name] = {"name": name, **timed(command, cache)}
            with file.open("a") as rows:
                rows.write(json.dumps(known[name]) + "\n")
            print(json.dumps(known[name]), flush=True)

    whole = arguments.folder / "sweep"
    grid = ["--recipe", arguments.recipes, "--sparsity", arguments.sparsities]
    measure("sweep", ["sweep", arguments.model, *grid, *texts, "--output", str(whole), "--overwrite"])
    cells = [
        (recipe, sparsity)
        for recipe in arguments.recipes.split(",")
        for sparsity in arguments.sparsities.split(",")
    ]
    same = True
    for recipe, sparsity in cells:
        name, out = f"{recipe}-{sparsity}", arguments.folder / f"{recipe}-{sparsity}"
        options = ["--recipe", recipe, "--sparsity", sparsity, "--output", str(out), "--overwrite"]
        measure(name, ["run", arguments.model, *options, *texts, "--samples-text", "0"])
        same = same and found(out) == found(whole / "cells" / name)
    total: dict[str, Any] = {"cells": len(cells), "same": same}
    for figure in ("seconds", "processor_seconds"):
        runs = sum(row[figure] for row in known.values() if row["name"] != "sweep")
        total[f"runs_{figure}"] = round(runs, 1)
        total[f"ratio_{figure}"] = round(known["sweep"][figure] / runs, 3)
    print(json.dumps(total))


if __name__ == "__main__":
    main()
