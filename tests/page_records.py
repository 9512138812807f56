"""Records of runs that nobody has run, for the pages made of them."""

from __future__ import annotations

import copy
import random

KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def matrix(name, shape, dice, sparsity=0.5, error=True):
    return {
        "name": name,
        "shape": list(shape),
        "pattern": "unstructured",
        "target_sparsity": sparsity,
        "sparsity": sparsity,
        "relative_error": dice.uniform(0.001, 0.2) if error else None,
        "pruner": "wanda",
        "steps": ["dsnot"],
        "seconds": 0.5,
    }


def dense_matrices(blocks=32, uniform=False):
    """Those of a model of `blocks` x 7 matrices."""
    dice = random.Random(0)
    return [
        matrix(f"model.layers.{b}.{kind}.weight", shape, dice, 0.5 if uniform else dice.uniform(0.4, 0.6))
        for b in range(blocks)
        for kind, shape in KINDS.items()
    ]


def expert_matrices(blocks=48, experts=128):
    """Those of a mixture of experts: four of attention and three of each expert, one of which no token has
    reached.
    """
    dice = random.Random(1)
    rows = []
    for b in range(blocks):
        for kind in list(KINDS)[:4]:
            rows.append(matrix(f"model.layers.{b}.{kind}.weight", KINDS[kind], dice))
        for e in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{b}.mlp.experts.{e}.{part}.weight"
                rows.append(matrix(name, (768, 2048), dice, dice.uniform(0.3, 0.7), error=e > 0))
    return rows


def record(matrices, scored=True):
    """A record of a run of recipe dsnot, as complete as the program writes it."""
    weights = sum(m["shape"][0] * m["shape"][1] for m in matrices)
    zeros = sum(int(m["shape"][0] * m["shape"][1] * m["sparsity"]) for m in matrices)
    perplexity = {
        "mean": "exp of the mean over non-overlapping windows of the mean loss over window - 1 targets",
        "text": "wikitext2",
        "window": 2048,
        "windows": 141,
        "dtype": "float16",
    }
    task = {"documents": 1838, "shots": 0, "version": 1, "higher_is_better": {"acc": True}}
    scores = {
        "perplexity": {"wikitext2": {"dense": 5.47, "pruned": 6.92, "protocol": perplexity}},
        "tasks": {
            name: {"acc": {"dense": 0.78, "pruned": 0.76, "stderr": 0.0099}, "protocol": task}
            for name in ("piqa", "boolq", "arc_easy")
        },
    }
    method = {"targets": ["*"]}
    return {
        "schema": 1,
        "model": {
            "source": "someone/a-model",
            "revision": "0123abc",
            "license": None,
            "license_name": None,
            "license_link": None,
            "architecture": "LlamaForCausalLM",
            "parameters": weights + 500_000_000,
            "digest": "sha256:" + 64 * "0",
        },
        "recipe": {
            "name": "mine",
            "description": "A <b>bold</b> recipe.",
            "sparsity": 0.5,
            "pattern": "unstructured",
            "scope": None,
            "pruner": {"name": "wanda", **method},
            "refiner": {"name": "dsnot", **method},
            "update": [],
            "allocator": {"name": "owl", **method},
            "rules": [],
            "order": "block",
            "permute": False,
            "calibration": {"source": "c4", "samples": 128, "sequence_length": 2048},
            "seed": 0,
            "chosen": "",
        },
        "calibration": {
            "source": "c4",
            "samples": 128,
            "sequence_length": 2048,
            "seed": 0,
            "digest": "sha256:" + 64 * "1",
        },
        "matrices": matrices,
        "totals": {
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "seconds": {"forward": 400.5, "prune": 90.25, "evaluate dense": 60.0, "total": 550.75},
            "peak_memory_bytes": 9_000_000_000,
            "bytes": {"dense": 2 * weights, "written": 2 * weights, "packed": int(1.25 * weights)},
            "files": {},
        },
        "evaluation": scores if scored else {"perplexity": {}, "tasks": {}},
        "environment": {
            "versions": {"llmprune": "0.1.0", "torch": "2.13.0", "lm_eval": "0.4.13"},
            "device": "CPU, 8 threads",
            "dtype": "float16",
            "processes": 1,
        },
        "speed": {
            "kernels": "AVX-512, 8 threads",
            "processor": "A processor",
            "values": "same",
            "shape": [14336, 4096],
            "tokens": {"1": {"faster_by": 1.41}, "16": {"faster_by": 0.93}},
        },
        "samples": {
            "tokens": 40,
            "texts": [{"prompt": "Water boils at", "dense": " 100 </pre> C.\x00", "pruned": " the & the"}],
        },
    }


def moved(known):
    """That record after a recovery in which masks move."""
    steps = range(10, 101, 10)
    curve = [
        {"step": n, "loss": 4 - n / 100, "held_out_loss": 3.9 - n / 110, "flipped": 1 / n, "sparsity": 0.5}
        for n in steps
    ]
    from llmprune.recipe import recovery

    found = copy.deepcopy(known)
    found["matrices"] = [{**row, "relative_error": None} for row in found["matrices"]]
    recipe = recovery.load(next(n for n in recovery.names() if recovery.load(n).as_dict().get("rule")))
    found["recovery"] = {
        "recipe": recipe.as_dict(),
        "text": {"source": "c4", "sequences": 100, "sequence_length": 2048, "seed": 0, "digest": "sha256:2"},
        "tokens": 1_000_000,
        "steps": 100,
        "asked": {"tokens": 1_000_000, "epochs": 1},
        "start": {"source": "pruned", "digest": "sha256:3"},
        "best_step": 90,
        "held_out": {"start": 3.9, "best": 3.08},
        "curve": curve,
    }
    for entry in found["evaluation"]["perplexity"].values():
        entry["start"] = 8.5
    return found


def swept(source="a <model>", text="text"):
    """The record of a sweep that was never run: three methods, a failed and a waiting cell, a task."""

    def cell(method, amount, value, status="done"):
        entry = {"name": f"{method}-{amount.replace(':', 'to')}", "method": method, "amount": amount}
        entry |= {"pattern": amount if ":" in amount else "unstructured", "status": status}
        entry |= {"sparsity": 0.5 if ":" in amount else float(amount), "recipe": {}, "calibration": "x"}
        entry |= {"folder": f"cells/{entry['name']}", "weights_kept": status == "done"}
        if status == "failed":
            return entry | {"error": "no <room> | left"}
        if status == "waiting":
            return entry
        task = {"t": {"acc": {"value": 0.5, "stderr": 0.03}}}
        sizes = {"dense": 10, "written": 10, "packed": 5}
        entry |= {"perplexity": {text: value}, "tasks": task, "bytes": sizes, "seconds": {"total": 61.0}}
        return entry | {"sparsity_reached": entry["sparsity"], "weights": 100}

    protocol = {"text": text, "window": 32, "windows": 4, "dtype": "float32"}
    task = {"documents": 100, "shots": 0, "version": 1, "higher_is_better": {"acc": True}}
    dense = {text: {"value": 20.0, "protocol": protocol}}
    tasks = {"t": {"acc": {"value": 0.6, "stderr": 0.03}, "protocol": task}}
    cells = [
        cell("wanda", "0.5", 30.0),
        cell("wanda", "0.6", 50.0),
        cell("wanda", "2:4", 123456.0),
        cell("best seed=1", "0.5", 22.0),
        cell("best seed=1", "0.6", 0.0, "failed"),
        cell("sparsegpt", "0.6", 40.0),
        cell("sparsegpt", "2:4", 0.0, "waiting"),
    ]
    return {
        "model": {"source": source, "parameters": 1000},
        "protocol": {"ranked_by": text, "perplexity": {text: protocol}, "tasks": {"t": task}},
        "dense": {"perplexity": dense, "tasks": tasks, "seconds": 1.0},
        "grid": {
            "recipe": ["wanda"],
            "sparsity": [0.5],
            "pattern": [],
            "pruner": [],
            "settings": {"seed": [1, 2]},
        },
        "environment": {"versions": {"llmprune": "1"}, "device": "CPU", "dtype": "float32"},
        "cells": cells,
        "keep": "best",
        "seconds": {"total": 61.0},
    }
