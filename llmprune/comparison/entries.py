"""The runs of a comparison, each by its record: `Entry`, and the figures it was scored with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmprune.record.figures import higher_is_better
from llmprune.record.history import pruned_here, trainings

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        name: by which the comparison calls it; no two have the same.
        record: its record.
        folder: where its masks lie; None where they are not at hand.
    """

    name: str
    record: Record
    folder: Path | None = None

    @property
    def model(self) -> str:
        """The dense model's name."""
        return str(self.record["model"]["source"])

    @property
    def identity(self) -> str:
        """The dense model: its weights where the record knows their digest, else name and revision."""
        model = self.record["model"]
        return str(model.get("digest") or (model["source"], model.get("revision")))

    @property
    def method(self) -> str:
        """The recipe of the pruning, and those of the trainings after it."""
        record = self.record
        names = [each["recipe"]["name"] for each in trainings(record)] if "recovery" in record else []
        if not names or pruned_here(record):
            names.insert(0, record["recipe"]["name"])
        return " + ".join(names)

    @property
    def pattern(self) -> str:
        """`unstructured`, an N:M, or several of them."""
        found = {matrix["pattern"] for matrix in self.record["matrices"]}
        return ", ".join(sorted(found)) or str(self.record["recipe"]["pattern"])

    @property
    def sparsity(self) -> float:
        """The share of zeros in the pruned matrices."""
        return float(self.record["totals"]["sparsity"])

    @property
    def pruned(self) -> float:
        """The share of weights that the masks prune; of what is kept, rounding may make some more zero."""
        rows = self.record["matrices"]
        known = [(row["shape"][0] * row["shape"][1], row.get("target_sparsity")) for row in rows]
        forms = (self.record["recipe"], self.record.get("format", {}))
        rounded = any(form.get("values", "same") != "same" for form in forms)
        if not rounded or not known or any(share is None for _, share in known):
            return self.sparsity
        return float(sum(size * share for size, share in known) / sum(size for size, _ in known))

    @property
    def seconds(self) -> float:
        """Of the whole run, scoring included."""
        return float(self.record["totals"]["seconds"]["total"])

    @property
    def written(self) -> int:
        """Bytes of the weight files."""
        return int(self.record["totals"]["bytes"]["written"])

    @property
    def packed(self) -> int:
        """Bytes of the weights where they are packed: as they are written, or would be by `convert`."""
        sizes = self.record["totals"]["bytes"]
        if "format" in self.record:
            return int(sizes["written"])
        return int(min(sizes.get("packed", sizes["written"]), sizes["written"]))

    @property
    def faster_by(self) -> float | None:
        """The speed of packed products at one token, dense = 1; None where the run has not measured it."""
        measured = self.record.get("speed", {}).get("tokens") or {}
        return float(measured["1"]["faster_by"]) if "1" in measured else None

    @property
    def stored(self) -> str:
        """The format of its weights and values."""
        form = self.record.get("format")
        if not form:
            return "dense"
        values = form.get("values", "same")
        return str(form["name"]) + (f", {values}" if values != "same" else "")


class Figure(NamedTuple):
    """A score of a run.

    Attributes:
        name: of text or task, and metric.
        value: of the pruned model. dense: of the dense one; None where it is not known.
        stderr: the standard error of `value`; None where it has none.
        higher: whether higher is better; None where nobody says so.
        protocol: how it was measured.
    """

    name: str
    value: float
    dense: float | None
    stderr: float | None
    higher: bool | None
    protocol: Record


def figures(record: Record) -> Iterator[Figure]:
    """Every score of a record."""
    evaluation = record.get("evaluation", {})
    for text, entry in evaluation.get("perplexity", {}).items():
        yield Figure(
            f"perplexity {text}", entry["pruned"], entry.get("dense"), None, False, entry["protocol"]
        )
    for task, metrics in evaluation.get("tasks", {}).items():
        protocol = metrics["protocol"]
        for metric, entry in metrics.items():
            if metric == "protocol" or entry["pruned"] is None:
                continue
            higher = higher_is_better(protocol, metric)
            yield Figure(
                f"{task} {metric}", entry["pruned"], entry.get("dense"), entry["stderr"], higher, protocol
            )


def names_of(places: Sequence[Path]) -> list[str]:
    """Names for different folders, no two alike: the last parts of their paths, as many as it takes."""
    parts, found = [place.parts for place in places], []
    most = max((len(part) for part in parts), default=1)
    for count in range(1, most + 1):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            break
    return found
