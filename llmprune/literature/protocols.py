"""Published figures beside our own: which are of the same model and sparsity, and of which protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.literature.figure import UNSTRUCTURED, WHOLE, Figure, Protocol
from llmprune.literature.published import all_figures, published_for

SAME = "same protocol"
PARTLY = "some matrices are left dense here"
_NEAR = 0.005  # sparsities are the same up to this: rounding leaves a matrix a little denser


@dataclass(frozen=True)
class Run:
    """One of our runs.

    Attributes:
        model: the dense model, as its record names it.
        pattern: `unstructured`, N:M, or several, of the result.
        sparsity: the share of zeros in the pruned matrices.
        evaluation: that entry of its record.
        trained: whether it was trained.
        partly: whether its recipe leaves matrices dense that others prune.
    """

    model: str
    pattern: str
    sparsity: float
    evaluation: Mapping[str, Any]
    trained: bool = False
    partly: bool = False


@dataclass(frozen=True)
class Beside:
    """A published figure and what a run has of the same text or tasks.

    Attributes:
        dense, pruned: ours, in the unit of the figure; None where the record does not have it.
        protocol: `same protocol`, or what differs.
    """

    figure: Figure
    dense: float | None
    pruned: float | None
    protocol: str


def beside(run: Run) -> tuple[Beside, ...]:
    """The published figures of a run's model at its pattern and sparsity, each with ours; none without."""
    return tuple(
        Beside(figure, *ours(figure, run.evaluation), difference(figure, run))
        for figure in published_for(run.model)
        if figure.pattern == run.pattern and abs(figure.sparsity - run.sparsity) <= _NEAR
    )


def side_by_side(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The published figures of the models of some runs at their sparsities, as plain values.

    Args:
        runs: by name.

    Returns:
        One row for each figure: `model`, `paper`, `where`, `url`, `method`, `amount` (the pattern, or the
        sparsity), `figure` (what was measured), `published`, `published_dense`, `theirs` (their protocol in
        words), and `ours`: `run`, `value`, `dense` and `protocol` (as in `Beside`) of every run at that
        sparsity.
    """
    found: dict[Figure, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        for own in beside(run):
            told = {"run": name, "value": own.pruned, "dense": own.dense, "protocol": own.protocol}
            found.setdefault(own.figure, []).append(told)
    order = {figure: place for place, figure in enumerate(all_figures())}
    return [
        {
            "model": figure.model,
            "paper": figure.source.paper,
            "where": figure.source.where,
            "url": figure.source.url,
            "method": figure.method,
            "amount": amount_of(figure.pattern, figure.sparsity),
            "figure": f"{figure.metric} {', '.join(figure.on)}",
            "published": figure.value,
            "published_dense": figure.dense,
            "theirs": protocol_words(figure.protocol),
            "ours": found[figure],
        }
        for figure in sorted(found, key=lambda figure: (figure.sparsity, figure.pattern, order[figure]))
    ]


def amount_of(pattern: str, sparsity: float) -> str:
    """How much a figure's model is pruned: its pattern, or the share without one."""
    return f"{sparsity:.0%}" if pattern == UNSTRUCTURED else pattern


def ours(figure: Figure, evaluation: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """What the entry `evaluation` of a record has of a figure's text or tasks: dense and pruned."""
    if figure.metric == "perplexity":
        entry = evaluation.get("perplexity", {}).get(figure.on[0], {})
        return entry.get("dense"), entry.get("pruned")
    entries = [evaluation.get("tasks", {}).get(task, {}).get("acc", {}) for task in figure.on]
    return _mean([e.get("dense") for e in entries]), _mean([e.get("pruned") for e in entries])


def difference(figure: Figure, run: Run) -> str:
    """Whether a run was measured by the protocol of a figure, and did what may be compared with it.

    Returns:
        `same protocol`, or in a few words what differs or is not known. An accuracy is never of the same
        protocol: no source says which version of which task was run.
    """
    differences = _of_text if figure.metric == "perplexity" else _of_tasks
    return "; ".join([*_of_work(figure, run), *differences(figure, run.evaluation)]) or SAME


def _of_work(figure: Figure, run: Run) -> Iterator[str]:
    if run.partly:
        yield PARTLY
    if run.trained != bool(figure.protocol.trained):
        yield "trained here, theirs is not" if run.trained else "theirs is trained"


def _of_text(figure: Figure, evaluation: Mapping[str, Any]) -> Iterator[str]:
    text, theirs = figure.on[0], figure.protocol
    entry = evaluation.get("perplexity", {}).get(text)
    if entry is None:
        yield f"{text} not measured here"
        return
    protocol = entry["protocol"]
    if theirs.window is None:
        yield "their window is not stated"
    elif theirs.window != protocol["window"]:
        yield f"window {protocol['window']}, theirs {theirs.window}"
    if theirs.windows is None:
        yield "how much of the text they read is not stated"
    elif theirs.windows == WHOLE and "limit" in protocol:
        yield f"{protocol['windows']} windows, theirs the whole text"
    elif theirs.windows not in (WHOLE, protocol["windows"]):
        yield f"{protocol['windows']} windows, theirs {theirs.windows}"


def _of_tasks(figure: Figure, evaluation: Mapping[str, Any]) -> Iterator[str]:
    tasks = evaluation.get("tasks", {})
    missing = [task for task in figure.on if task not in tasks]
    if missing:
        yield f"{', '.join(missing)} not measured here"
        return
    shots = sorted({tasks[task]["protocol"]["shots"] for task in figure.on})
    if shots != [figure.protocol.shots]:
        yield f"{' and '.join(map(str, shots))} shots, theirs {figure.protocol.shots}"
    yield "their version of the tasks is not stated"


def _mean(values: list[Any]) -> float | None:
    """The mean in percent; None where one is missing."""
    return None if None in values else 100 * sum(values) / len(values)


def protocol_words(protocol: Protocol) -> str:
    """A protocol in a few words."""
    return "; ".join(_words(protocol))


def _words(protocol: Protocol) -> Iterator[str]:
    if protocol.window:
        yield f"windows of {protocol.window}"
    if protocol.shots is not None:
        yield f"{protocol.shots} shots"
    if protocol.windows is not None:
        yield "the whole text" if protocol.windows == WHOLE else f"{protocol.windows} windows"
    length = f" of {protocol.length}" if protocol.length else ""
    rows = f"{protocol.samples} rows{length}" if protocol.samples else ""
    if protocol.calibration or rows:
        yield f"calibrated on {', '.join(filter(None, (protocol.calibration, rows)))}"
    if protocol.trained:
        yield f"trained: {protocol.trained}"
    if protocol.note:
        yield protocol.note
