"""Every perplexity of the reference folder against ours: `reference.py FOLDER`, the folder that holds
models/, data/ and reference/.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.checkpoint.masks import read_masks, unpack

PAPER = "sparsegpt-paper"  # runs on the checkpoint as it is stored, in bfloat16


def variants(name):
    """(label, recipe, options) for a name of the reference such as `dsnot-all-0.6` or `sparsegpt-2:4`."""
    method, _, amount = name.rpartition("-")
    options = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    if method.startswith("dsnot"):
        settings = {"refiner.targets": ["*"]} if method == "dsnot-all" else {}
        yield "", "dsnot-paper", {**options, "settings": settings}
        return
    yield "", method, options
    if method in ("sparsegpt", "magnitude") and ":" not in amount:
        yield "published counts", method, {**options, "settings": {"scope": "published"}}
    if method == "wanda":
        yield "verified dsnot", "dsnot", options
    if method == "sparsegpt":
        yield PAPER, PAPER, options


def agreement(ours, published):
    """Share of equal keep mask entries: of the matrix where it is lowest, and of all matrices."""
    wanted = load_file(published)
    kept = {n: (keep, unpack(wanted[n], keep.shape[1])) for n, keep in read_masks(ours).items()}
    equal = {n: int((mine == theirs).sum()) for n, (mine, theirs) in kept.items()}
    sizes = {n: mine.numel() for n, (mine, _) in kept.items()}
    return min(equal[n] / sizes[n] for n in sizes), sum(equal.values()) / sum(sizes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="some of the reference's names only")
    arguments = parser.parse_args()
    folder = arguments.folder
    results = json.loads((folder / "reference/results.json").read_text())["results"]
    model = AutoModelForCausalLM.from_pretrained(folder / "models/english-8m", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/english-8m")
    text, tokens = str(folder / "data/wikitext-2/test.txt"), str(folder / "reference/calibration.safetensors")
    agreements = []
    print("| | published | ours | difference | sparsity |\n|---|---|---|---|---|", flush=True)
    for name in arguments.names or (n for n in results if n != "dense"):
        for label, recipe, options in variants(name):
            with tempfile.TemporaryDirectory() as out:
                run = llmprune.prune(
                    folder / "models/english-8m" if recipe == PAPER else model,
                    tokenizer=tokenizer,
                    recipe=recipe,
                    calibration=tokens,
                    output=f"{out}/m",
                    **options,
                )
                scoring = {"eval_seqlen": 256, "limit": 200, "dtype": "float32"}
                scores = llmprune.evaluate(f"{out}/m", perplexity=[text], **scoring)
                if (masks := folder / f"reference/{name.replace(':', 'to')}.masks.safetensors").exists():
                    agreements.append((name, label, agreement(Path(out) / "m/masks.safetensors", masks)))
            ours = scores["perplexity"]["test.txt"]["value"]
            wanted = results[name]["perplexity"]
            what = f"{name} ({label})" if label else name
            print(
                f"| {what} | {wanted:.4f} | {ours:.4f} | {ours / wanted - 1:+.2%} | "
                f"{run.record['totals']['sparsity']:.6f} |",
                flush=True,
            )
    for name, label, (least, whole) in agreements:
        what = f"{name} ({label})" if label else name
        print(f"masks of {what}: {whole:.4%} of all entries agree, {least:.4%} of the worst matrix")


if __name__ == "__main__":
    main()
