"""A figure that a paper published: of which model and method, how it was measured, and where it was read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

UNSTRUCTURED = "unstructured"
WHOLE = "whole"
SEEN_IN = {
    "paper": "a copy of the paper's text",
    "readme": "the README of its official repository",
    "card": "a model card by its authors",
    "quote": "a public text that quotes it",
}  # where a figure was read


@dataclass(frozen=True)
class Protocol:
    """How a figure was measured, as far as its source says so; None where it does not.

    Attributes:
        window: tokens per evaluation window, of perplexity.
        windows: how many windows, or `whole` for all of the text.
        shots: examples in the prompt, of an accuracy.
        calibration: the calibration text.
        samples, length: rows of calibration, and tokens in each.
        trained: what was trained; None for nothing.
        note: what else is to be known.
    """

    window: int | None = None
    windows: int | str | None = None
    shots: int | None = None
    calibration: str | None = None
    samples: int | None = None
    length: int | None = None
    trained: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a figure stands, and where it was read.

    Attributes:
        paper: the paper's short name.
        title: its title.
        where: the table.
        url: the page on which the figure was read; the paper's, where it was a copy or a quote whose address
            is not known.
        via: how it was read, a key of `SEEN_IN`.
        seen: the day, as YYYY-MM-DD.
    """

    paper: str
    title: str
    where: str
    url: str
    via: str
    seen: str


@dataclass(frozen=True)
class Figure:
    """One published figure.

    Attributes:
        model: the hub id of the dense model.
        method: what was done, in names joined by `+`: those of llmprune where it has the method.
        about: the method in words.
        pattern: `unstructured` or N:M.
        sparsity: the share of zeros in the pruned matrices.
        metric: `perplexity`, or `accuracy` in percent.
        on: the text of a perplexity; the tasks of an accuracy, the mean of them where there are several.
        value: the figure of the pruned model.
        dense: that of the dense model from the same source; None where it was not seen.
    """

    model: str
    method: str
    about: str
    pattern: str
    sparsity: float
    metric: str
    on: tuple[str, ...]
    value: float
    dense: float | None
    protocol: Protocol
    source: Source

    @property
    def key(self) -> tuple[object, ...]:
        """The same for two entries of one figure."""
        measured = dataclasses.replace(self.protocol, note=None)
        return (self.source.paper, self.model, self.method, self.pattern, self.sparsity, self.on, measured)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"on": list(self.on)}
