"""Every method of recovery in one table: `python eval/bench/recovery.py demo FOLDER` (one process; hours).

`demo`: 80 % and 2:4, 0.5 M tokens of text like that the model was trained on. `english --model DIR
--text FILE`: 70 %, 80 % and 2:4, 2 M tokens. Rows are appended to FOLDER/rows.jsonl as they come; rows that
are there already are not measured again, and `--table` prints what is there. Every row stands beside its
start, masked fine-tuning from the same start, and the dense model trained with the same tokens. Every row is
measured in a process of its own, whose peak of private memory is `memory`. `--memory` measures that alone, in
12 steps of 8 sequences at the rate that is there, for all rows that are there. The table's seconds are those
of processors where they were counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import llmprune

AIMS: dict[str, dict[str, Any]] = {
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
}
FROM_BEST = ("masked-finetuning", "recover-best", "squarehead", "masklora", "perp", "spp", "ebft", "soup")
FROM_WANDA = (
    "masked-finetuning",
    "sr-ste",
    "ast",
    "mdgf",
    "rigl",
    "set",
    "itop",
    "grow-momentum",
    "dst-ee",
    "iss-p",
    "dpf",
    "acdc",
    "gap",
    "elsa",
    "jackpots",
    "pst",
    "maskllm",
)
FROM_DENSE = ("gmp", "sdgf", "losa", "sparse-llama", "powerprop")


def rows(aims: list[str]) -> list[tuple[str, str, str]]:
    """(aim, start, recipe) of every row; a recipe of "" is the start itself."""
    found = [("dense", "dense", ""), ("dense", "dense", "masked-finetuning")]
    for aim in aims:
        found += [(aim, "best", ""), (aim, "wanda", "")]
        found += [(aim, "best", name) for name in FROM_BEST]
        found += [(aim, "wanda", name) for name in FROM_WANDA if name != "maskllm" or aim == "2:4"]
        found += [(aim, "dense", name) for name in FROM_DENSE]
    return found


class Bench:
    """Measures rows and keeps them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a, self.file = arguments, arguments.folder / "rows.jsonl"
        self.known = {}
        if self.file.is_file():
            listed = (json.loads(line) for line in self.file.read_text().splitlines())
            self.known = {(row["aim"], row["start"], row["recipe"]): row for row in listed}

    def start(self, aim: str, kind: str) -> str:
        """The folder of a start, made where it is not there."""
        if kind == "dense":
            return str(self.a.model)
        folder = self.a.folder / f"{kind}-{aim.replace(':', 'to').replace('%', '')}"
        if not folder.is_dir():
            text = {"calibration": self.a.calibration} if self.a.calibration else {}
            llmprune.prune(self.a.model, recipe=kind, output=folder, **text, **AIMS[aim])
        return str(folder)

    def perplexity(self, path: str) -> float:
        """On the scored text, in float32 or bfloat16 as the machine has it."""
        scores = llmprune.evaluate(path, perplexity=[self.a.score], eval_seqlen=self.a.seqlen)
        return next(iter(scores["perplexity"].values()))["value"]

    def measure(self, aim: str, kind: str, recipe: str) -> dict[str, Any]:
        """One row."""
        start = self.start(aim, kind)
        started, worked = time.monotonic(), time.process_time()
        row: dict[str, Any] = {"aim": aim, "start": kind, "recipe": recipe}
        if not recipe:
            return row | {"perplexity": self.perplexity(start), "seconds": 0.0}
        aims = ({"sparsity": 0} if aim == "dense" else AIMS[aim]) if kind == "dense" else {}
        out = self.a.folder / "out"
        rate = self.known.get((aim, kind, recipe), {}).get("rate")
        record = llmprune.recover(
            start,
            recipe=recipe,
            text=self.a.text,
            tokens=self.a.tokens,
            epochs=self.a.epochs,
            seqlen=self.a.seqlen,
            teacher=None if kind == "dense" else self.a.model,
            output=out,
            score=False,
            overwrite=True,
            restart=True,
            dtype=self.a.dtype,
            settings={"rate.rate": rate} if rate else None,
            **aims,
        ).record
        recovery = record["recovery"]
        row["memory"] = record["totals"]["peak_private_memory_bytes"]
        if self.a.memory:
            return row
        return row | {
            "perplexity": self.perplexity(str(out)),
            "held_out": recovery.get("held_out"),
            "rate": recovery.get("rate"),
            "best_step": recovery.get("best_step"),
            "steps": recovery["steps"],
            "sparsity": record["totals"]["sparsity"],
            "dtype": self.a.dtype,
            "seconds": round(time.monotonic() - started, 1),
            "processor_seconds": round(time.process_time() - worked, 1),
        }

    def alone(self, key: tuple[str, str, str]) -> dict[str, Any]:
        """One row, measured in a process of its own."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(self.measure, *key).result()
            except (ValueError, RuntimeError) as error:
                return dict(zip(("aim", "start", "recipe"), key, strict=True)) | {"error": str(error)}

    def run(self, wanted: list[tuple[str, str, str]]) -> None:
        """Measure what is not known yet."""
        self.a.folder.mkdir(parents=True, exist_ok=True)
        for key in wanted:
            if key not in self.known:
                self.known[key] = row = self.alone(key)
                with self.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)

    def memories(self, wanted: list[tuple[str, str, str]]) -> None:
        """Measure the memory of known rows again, in a few steps each."""
        self.a.tokens, self.a.epochs = 12 * 8 * self.a.seqlen, 1
        for key in wanted:
            if key[2] and key in self.known:
                found = self.alone(key)
                print(*key, found.get("error") or found["memory"], flush=True)
                self.known[key]["memory"] = found.get("memory")
                self.file.write_text("".join(json.dumps(row) + "\n" for row in self.known.values()))

    def table(self, wanted: list[tuple[str, str, str]]) -> None:
        """Print what is known as a table in Markdown."""
        dense = self.known.get(("dense", "dense", "masked-finetuning"), {}).get("perplexity")
        print("| aim | start | recipe | perplexity | of the gap | rate | best step | seconds | memory |")
        print("|---|---|---|---|---|---|---|---|---|")
        for key in wanted:
            row = self.known.get(key)
            if row is None or "perplexity" not in row:
                print(f"| {' | '.join(key)} | {row['error'] if row else 'not measured'} | | | | | |")
                continue
            before = self.known.get((key[0], key[1], ""), {}).get("perplexity")
            closed = ""
            if key[2] and dense and before and key[1] != "dense":
                closed = f"{(before - row['perplexity']) / (before - dense):.0%}"
            rate = f"{row['rate']:.2g}" if row.get("rate") else ""
            step = f"{row.get('best_step')} of {row['steps']}" if key[2] else ""
            memory = f"{row['memory'] / 1e9:.2f} GB" if row.get("memory") else ""
            recipe, seconds = key[2] or "(the start itself)", row.get("processor_seconds") or row["seconds"]
            print(
                f"| {key[0]} | {key[1]} | {recipe} | {row['perplexity']:.2f} | {closed} | {rate} | {step} | "
                f"{seconds:.0f} | {memory} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", choices=("demo", "english"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--score", default="builtin")
    parser.add_argument(
        "--calibration", default="", help="text of the starts; that of their recipe if not given"
    )
    parser.add_argument("--dtype", default="float32", help="of the forward and backward passes")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--aims", default="")
    parser.add_argument("--only", default="", help="recipes, separated by commas")
    parser.add_argument("--starts", default="best,wanda,dense")
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--memory", action="store_true", help="measure the memory of what is there")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (500_000 if arguments.case == "demo" else 2_000_000)
    usual = "80%,2:4" if arguments.case == "demo" else "80%,2:4,70%"
    only = set(filter(None, arguments.only.split(",")))
    wanted = [row for row in rows((arguments.aims or usual).split(",")) if not only or row[2] in only | {""}]
    wanted = [row for row in wanted if row[1] in arguments.starts.split(",")]
    bench = Bench(arguments)
    if arguments.memory:
        bench.memories(wanted)
    elif not arguments.table:
        bench.run(wanted)
    bench.table(wanted)


if __name__ == "__main__":
    main()
