"""The record of a run, `llmprune.json`: everything needed to repeat it and to check what it claims."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from llmprune.checkpoint.contents import SCHEMA
from llmprune.checkpoint.journal import Identity
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.contracts import CalibrationSet
from llmprune.evaluation.scores import Scores
from llmprune.machine import device as devices
from llmprune.model.opening import Model
from llmprune.recipe.types import Recipe
from llmprune.record.figures import Record
from llmprune.record.licence import read_licence


def opening(model: Model, recipe: Recipe, rows: CalibrationSet, digest: str, processes: int) -> Record:
    """What the record says of a run before it starts. `digest`: fingerprint of the model's weights."""
    return {
        "schema": SCHEMA,
        "model": {
            "source": model.label,
            "revision": model.located.revision if model.located else None,
            **read_licence(model.located.folder if model.located else None),
            "architecture": type(model.skeleton.model).__name__,
            "parameters": sum(model.source.tensors[s].elements for s in set(model.skeleton.stored.values())),
            "digest": digest,
            **({"unused_tensors": model.skeleton.unused} if model.skeleton.unused else {}),
        },
        "recipe": recipe.as_dict(),
        "calibration": {
            "source": rows.source,
            "samples": rows.tokens.shape[0],
            "sequence_length": rows.tokens.shape[1],
            "seed": rows.seed,
            "digest": rows.digest,
            **rows.details,
        },
        "environment": environment(model.skeleton.device, model.skeleton.dtype, processes),
    }


def allocation(recipe: Recipe, measures: Mapping[int, float], losses: Mapping[int, float]) -> Record:
    """What the allocator measured, by block, and the loss of its trials, by their label; nothing where there is neither."""
    labels = recipe.build_allocator().trials
    found = {
        "measure": {f"block {number + 1}": value for number, value in measures.items()},
        "held-out loss": {labels[number]: value for number, value in losses.items()},
    }
    return (
        {"allocation": {key: values for key, values in found.items() if values}} if measures or losses else {}
    )


def measured(record: Record) -> tuple[dict[int, float], dict[int, float]] | None:
    """Measures and losses of `allocation`, read back from a record; None where it has none."""
    found = record.get("allocation")
    return found and tuple(
        dict(enumerate(found.get(key, {}).values())) for key in ("measure", "held-out loss")
    )


def calibrated_on(calibration: Mapping[str, Any]) -> str:
    """The source of calibration rows in words, with what it leaves open of how they were made."""
    notes = [f"{rows} rows of {part}" for part, rows in calibration.get("parts", {}).items()]
    if "temperature" in calibration:
        notes.append(
            f"sampled from the model at temperature {calibration['temperature']:g}, top-p {calibration['top_p']:g}"
        )
    if "chat" in calibration:
        notes.append(
            "chats in the tokenizer's template"
            if calibration["chat"] == "template"
            else "chats as lines of role: content"
        )
    return f"{calibration['source']} ({', '.join(notes)})" if notes else str(calibration["source"])


def identity(record: Record) -> Identity:
    """What must be the same for a run to end with the same bytes (as far as this program can tell)."""
    around = record["environment"]
    return {
        "model": record["model"]["digest"],
        "calibration": record["calibration"]["digest"],
        "recipe": {key: value for key, value in record["recipe"].items() if key != "chosen"},
        "versions": {name: around["versions"][name] for name in ("llmprune", "torch", "transformers")},
        "dtype": around["dtype"],
        "device": around["device"].partition(",")[0],
    }


def complete(
    before: Record,
    model: Model,
    matrices: list[Record],
    seconds: dict[str, float],
    private: int | None,
    writer: CheckpointWriter,
) -> Record:
    """The record of a finished run, not scored yet. `matrices`: the rows of `run.prune_blocks`; `seconds` by phase."""
    weights = sum(m["shape"][0] * m["shape"][1] for m in matrices)
    zeros = sum(m["zeros"] for m in matrices)
    return {
        **{
            key: before[key]
            for key in ("schema", "model", "recipe", "calibration", "allocation")
            if key in before
        },
        "matrices": [{k: v for k, v in m.items() if k != "zeros"} for m in matrices],
        "totals": {
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "seconds": {k: round(v, 3) for k, v in seconds.items()}
            | {"total": round(sum(seconds.values()), 3)},
            "peak_memory_bytes": devices.peak_memory(),
            "peak_private_memory_bytes": private,
            "peak_device_memory_bytes": devices.peak_device_memory(model.skeleton.device),
            "bytes": {
                "dense": sum(t.bytes for t in model.source.tensors.values()),
                "written": sum(p.stat().st_size for p in writer.folder.glob("model-*.safetensors")),
            },
            "files": writer.files,
        },
        "evaluation": {"perplexity": {}, "tasks": {}},
        "environment": before["environment"],
    }


def environment(device: torch.device, dtype: torch.dtype, processes: int = 1) -> Record:
    """Versions and device a run depends on."""
    from importlib.metadata import version

    from llmprune import __version__

    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors", "lm_eval", "numpy")
    versions = {"llmprune": __version__, "python": platform.python_version()} | {
        p: version(p) for p in packages
    }
    return {
        "versions": versions,
        "device": devices.describe(device),
        "dtype": str(dtype).removeprefix("torch."),
        "processes": processes,
    }


def add_scores(record: Record, dense: Scores, pruned: Scores) -> Record:
    """A record with dense and pruned scores side by side, each with its protocol."""
    perplexity = {
        name: {
            "dense": dense.perplexity[name]["value"],
            "pruned": entry["value"],
            "protocol": entry["protocol"],
        }
        for name, entry in pruned.perplexity.items()
    }
    tasks: Record = {}
    for name, metrics in pruned.tasks.items():
        before = dense.tasks.get(name, {})
        measured = [m for m in {**before, **metrics} if m != "protocol"]
        tasks[name] = {
            metric: {
                "dense": before.get(metric, {}).get("value"),  # None: no finite number came out
                "pruned": metrics.get(metric, {}).get("value"),
                "stderr": metrics.get(metric, {}).get("stderr"),
            }
            for metric in measured
        } | {"protocol": metrics["protocol"]}
    seconds = {"evaluate dense": round(dense.seconds, 3), "evaluate pruned": round(pruned.seconds, 3)}
    spent = record["totals"]["seconds"]
    total = round(spent["total"] + sum(seconds.values()), 3)
    totals = record["totals"] | {
        "seconds": spent | seconds | {"total": total},
        "peak_memory_bytes": devices.peak_memory(),
    }
    return record | {"evaluation": {"perplexity": perplexity, "tasks": tasks}, "totals": totals}
