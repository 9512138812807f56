"""Says through which trainings a model has gone, and how it was pruned before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]


def trainings(record: Mapping[str, Any]) -> list[Record]:
    """Every recovery that a model has gone through, in their order."""
    return [*record["recovery"].get("earlier", []), record["recovery"]]


def pruned_here(record: Mapping[str, Any]) -> bool:
    """Whether a record knows how the model was pruned before it was first trained.

    What began dense, or with masks from elsewhere, has the name of its training in the place of a pruner.
    """
    recipe, first = record["recipe"], trainings(record)[0]["recipe"]
    unknown = recipe["calibration"]["source"] == "none" and recipe["pruner"]["name"] == first["name"]
    return not unknown


def with_training(pruned_by: str, record: Mapping[str, Any]) -> str:
    """The method in words. `pruned_by`: how the start was pruned, which is left out where nobody knows."""
    done = ", then ".join(each["recipe"]["name"] + _aim(each) for each in trainings(record))
    if pruned_here(record):
        return f"{pruned_by}, recovered by {done}"
    if not record["totals"]["zeros"]:
        return f"dense, trained by {done}"
    patterns = ", ".join(sorted({matrix["pattern"] for matrix in record["matrices"]}))
    return f"{patterns}, trained by {done}"


def _aim(recovery: Mapping[str, Any]) -> str:
    """The pattern and sparsity that a training ended with; empty where it kept those of the start."""
    aim = recovery.get("aim")
    if not aim:
        return ""
    return f" to {aim['sparsity']:.4g}" if aim["pattern"] == "unstructured" else f" to {aim['pattern']}"
