"""Builds the record of a run, `llmprune.json`: what is needed to repeat the run, and what came of it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Any

import torch

from llmprune.checkpoint.contents import RECORD, SCHEMA
from llmprune.checkpoint.journal import Identity
from llmprune.checkpoint.masks import KeepMasks
from llmprune.checkpoint.reader import read_record
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.common.version import __version__
from llmprune.contracts import CalibrationSet, Measure
from llmprune.evaluation.scores import Scores
from llmprune.machine import device as devices
from llmprune.model.classes import CAUSAL
from llmprune.model.opening import Model
from llmprune.recipe.types import Recipe
from llmprune.record.figures import Record
from llmprune.record.licence import read_licence


def packed_form(values: str = "same") -> Record:
    """The entry `format` of a record of packed weights. `values`: how they are packed."""
    return {"format": {"name": "packed", "values": values}}


def opening(model: Model, recipe: Recipe, rows: CalibrationSet, digest: str, processes: int) -> Record:
    """What the record says about a run before it starts.

    Args:
        recipe: the recipe with its calibration as it is used.
        rows: the calibration rows.
        digest: a fingerprint of the model's weights.
        processes: how many processes share the run.
    """
    return {
        "schema": SCHEMA,
        "model": {
            "source": model.label,
            "revision": model.located.revision if model.located else None,
            **read_licence(model.located.folder if model.located else None),
            "architecture": type(model.skeleton.model).__name__,
            **_as_opened(model),
            "parameters": model.skeleton.elements,
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


def _as_opened(model: Model) -> Record:
    """How the model was opened, where that was not as usual."""
    skeleton = model.skeleton
    return {
        **({} if skeleton.auto_class == CAUSAL else {"auto_class": skeleton.auto_class}),
        **({"blocks": skeleton.given_blocks} if skeleton.given_blocks else {}),
        **({"dequantized": True} if model.options.dequantize else {}),
    }


def origin(masks: KeepMasks) -> Record:
    """The entry `masks` of the record: which masks were given, and what the record beside them says."""
    found: Record = {"digest": masks.digest}
    if masks.folder is not None and (masks.folder / RECORD).is_file():
        beside = read_record(masks.folder)
        model, recipe = (beside.get(key) for key in ("model", "recipe"))
        if isinstance(model, dict) and isinstance(recipe, dict):
            revision = model.get("revision")
            found |= {
                "model": _without_path(str(model.get("source"))),
                "revision": revision if isinstance(revision, str) else None,
                "recipe": _without_path(str(recipe.get("name"))),
            }
    return {"masks": found}


def _without_path(name: str) -> str:
    """A hub id or another name as it is; of a path only its last part."""
    local = name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if local else name


def allocation(recipe: Recipe, measures: Mapping[int, Measure], losses: Mapping[int, float]) -> Record:
    """The entry `allocation` of the record; an empty dict where the allocator measured nothing.

    Args:
        measures: what the allocator measured, by the number of the block.
        losses: the held-out loss of the allocations it tried, by their number.
    """
    labels = recipe.build_allocator().trials
    found = {
        "measure": {f"block {number + 1}": value for number, value in measures.items()},
        "held-out loss": {labels[number]: value for number, value in losses.items()},
    }
    found = {key: values for key, values in found.items() if values}
    return {"allocation": found} if found else {}


def measured(record: Record) -> tuple[dict[int, Measure], dict[int, float]] | None:
    """The arguments of `allocation`, read back from a record; None where it has none."""
    found = record.get("allocation")
    return found and tuple(
        dict(enumerate(found.get(key, {}).values())) for key in ("measure", "held-out loss")
    )


def calibrated_on(calibration: Mapping[str, Any]) -> str:
    """The source of calibration rows in words, with notes on how the rows were made."""
    notes = [f"{rows} rows of {part}" for part, rows in calibration.get("parts", {}).items()]
    if "temperature" in calibration:
        temperature, top_p = calibration["temperature"], calibration["top_p"]
        notes.append(f"sampled from the model at temperature {temperature:g}, top-p {top_p:g}")
    if "chat" in calibration:
        template = calibration["chat"] == "template"
        notes.append("chats in the tokenizer's template" if template else "chats as lines of role: content")
    return f"{calibration['source']} ({', '.join(notes)})" if notes else str(calibration["source"])


def identity(record: Record) -> Identity:
    """What decides the bytes of a run's output: only a run with the same identity may be resumed."""
    environment = record["environment"]
    named = {"blocks": record["model"].get("blocks"), "format": record.get("format")}
    return {
        **{key: value for key, value in named.items() if value is not None},
        "model": record["model"]["digest"],
        "calibration": record["calibration"]["digest"],
        "recipe": {key: value for key, value in record["recipe"].items() if key != "chosen"},
        "versions": {name: environment["versions"][name] for name in ("llmprune", "torch", "transformers")},
        "dtype": environment["dtype"],
        "device": environment["device"].partition(",")[0],
    }


def complete(
    before: Record,
    model: Model,
    matrices: list[Record],
    seconds: dict[str, float],
    private: int | None,
    writer: CheckpointWriter,
) -> Record:
    """The record of a run that has pruned every matrix and is not scored yet.

    Args:
        before: the record as it was at the start, see `opening`, `origin` and `allocation`.
        matrices: what each matrix contributes to the record.
        seconds: the time each phase took.
        private: the peak of the memory that belongs to the process alone, in bytes; None where unknown.
        writer: knows the files that were written.
    """
    weights = sum(m["shape"][0] * m["shape"][1] for m in matrices)
    zeros = sum(m["zeros"] for m in matrices)
    times = {phase: round(value, 3) for phase, value in seconds.items()}
    kept = ("schema", "model", "recipe", "masks", "calibration", "allocation", "recovery", "format")
    return {
        **{key: before[key] for key in kept if key in before},
        "matrices": [{k: v for k, v in m.items() if k != "zeros"} for m in matrices],
        "totals": {
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "seconds": times | {"total": round(sum(seconds.values()), 3)},
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


def values_of(record: Record) -> str:
    """How the kept values of a record's weights are packed, or would be."""
    return str(record.get("format", {}).get("values", "same"))


def converted(
    known: Record | None, model: Model, writer: CheckpointWriter, form: Record, seconds: float
) -> Record:
    """The record of a checkpoint that was written in another format.

    Args:
        known: the record of the source; None where it has none: then there is no recipe in the result.
        form: the entry `format` of the result; empty for a dense one.
        seconds: that this took.
    """
    rows = writer.rows
    weights, zeros = (sum(row["shape"][0] * row["shape"][1] for row in rows), sum(r["zeros"] for r in rows))
    sizes = {
        "dense": sum(t.bytes for t in model.source.tensors.values()),
        "written": sum(p.stat().st_size for p in writer.folder.glob("model-*.safetensors")),
    }
    if form:
        sizes["packed"] = sizes["written"]
    elif known is not None and "packed" in known["totals"]["bytes"]:
        sizes["packed"] = known["totals"]["bytes"]["packed"]
    if known is not None:
        # A speed was measured, and texts written, with other values than these where they are rounded now.
        old = known.get("speed", {}).get("values") != values_of(form) if form else False
        left = {"format"} | ({"speed"} if old else set())
        left |= {"samples"} if form and values_of(form) != values_of(known) else set()
        kept = {key: value for key, value in known.items() if key not in left}
        totals = {**known["totals"], "bytes": sizes, "files": writer.files}
        return kept | form | {"totals": totals}
    skeleton = model.skeleton
    return {
        "schema": SCHEMA,
        "model": {
            "source": model.label,
            "revision": model.located.revision if model.located else None,
            **read_licence(model.folder),
            "architecture": type(skeleton.model).__name__,
            **_as_opened(model),
            "parameters": skeleton.elements,
        },
        **form,
        "matrices": [{k: v for k, v in row.items() if k not in ("zeros", "signs")} for row in rows],
        "totals": {
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights,
            "seconds": {"total": round(seconds, 3)},
            "bytes": sizes,
            "files": writer.files,
        },
        "environment": environment(skeleton.device, skeleton.dtype),
    }


def with_rows(record: Record, rows: list[Record]) -> Record:
    """The record with other numbers of zeros, by the name of the matrix; the rest of every row stays."""
    found = {row["name"]: row for row in rows}
    matrices = [{**row, "sparsity": found[row["name"]]["sparsity"]} for row in record["matrices"]]
    zeros = sum(row["zeros"] for row in rows)
    totals = {**record["totals"], "zeros": zeros, "sparsity": zeros / record["totals"]["weights"]}
    return record | {"matrices": matrices, "totals": totals}


def environment(device: torch.device, dtype: torch.dtype, processes: int = 1) -> Record:
    """What a run depends on besides its input: versions of packages, device, dtype, number of processes."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors", "lm_eval", "numpy")
    own = {"llmprune": __version__, "python": platform.python_version()}
    return {
        "versions": own | {package: version(package) for package in packages},
        "device": devices.describe(device),
        "dtype": str(dtype).removeprefix("torch."),
        "processes": processes,
    }


def add_scores(record: Record, dense: Scores, pruned: Scores) -> Record:
    """The record with the scores of the dense and of the pruned model, and the protocol of each score."""
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
                "dense": before.get(metric, {}).get("value"),  # None where lm-eval gave no number
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
