"""Draws the plots of the report: matrices by block, and a training by step. PNGs, encoded in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.recipe.summary import summary

Rows = Sequence[Mapping[str, Any]]
_SIZE = (9, 3.4)


def encoded_matrices(matrices: Rows, errors: bool) -> str:
    """Relative error (where there are `errors`) and sparsity by block, a line per kind of matrix."""
    figure, axes = _figure(2 if errors else 1)
    kinds: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for matrix in matrices:
        parts = matrix["name"].removesuffix(".weight").split(".")
        kind = next((part for part in reversed(parts) if not part.isdigit()), "")
        block = next((int(part) for part in parts if part.isdigit()), 0)
        kinds.setdefault(kind, {}).setdefault(block, []).append(matrix)
    for kind, blocks in kinds.items():  # of experts the mean
        if errors:
            known = {
                b: [e for m in rows if (e := m["relative_error"]) is not None] for b, rows in blocks.items()
            }
            means = {b: sum(found) / len(found) for b, found in known.items() if found}
            axes[0].plot(list(means), list(means.values()), marker=".", label=kind)
        zeros = [sum(m["sparsity"] for m in rows) / len(rows) for rows in blocks.values()]
        axes[-1].plot(list(blocks), zeros, marker=".", label=kind)
    if errors:
        axes[0].set(title="relative output error", xlabel="block", ylim=(0, None))
    axes[-1].set(title="sparsity", xlabel="block", ylim=(0, 1))
    axes[-1].legend(fontsize=7, ncols=2)
    return _encoded(figure, axes)


def encoded_curves(recovery: Mapping[str, Any]) -> str:
    """Loss on the batches and on held-out text by step; of masks that move, their flips and the sparsity."""
    curve, start = recovery["curve"], recovery["held_out"]["start"]
    moves = bool(recovery["recipe"].get("rule"))
    figure, axes = _figure(2 if moves else 1)
    steps = [row["step"] for row in curve]
    held = [row["held_out_loss"] for row in curve]
    axes[0].plot(
        steps, [row["loss"] for row in curve], marker=".", color="#8c8c8c", label=f"batches{_loss(recovery)}"
    )
    begun = ([0], [start]) if start is not None else ([], [])
    axes[0].plot([*begun[0], *steps], [*begun[1], *held], marker=".", color="#1f77b4", label="held out")
    best, step = recovery["held_out"]["best"], recovery["best_step"]
    if best is not None:
        axes[0].plot(
            [step],
            [best],
            marker="o",
            markersize=9,
            markerfacecolor="none",
            color="#d62728",
            linestyle="none",
            label=f"saved, step {step}",
        )
    axes[0].set(title="loss", xlabel="step")
    axes[0].legend(fontsize=8)
    if moves:
        axes[1].plot(steps, [row["sparsity"] for row in curve], marker=".", label="sparsity")
        axes[1].plot(
            steps, [row["flipped"] for row in curve], marker=".", label="flipped since the point before"
        )
        axes[1].set(title="masks, share of all entries", xlabel="step", ylim=(0, None))
        axes[1].legend(fontsize=8)
    return _encoded(figure, axes)


def encoded_blocks(blocks: Rows) -> str:
    """The held-out error of every block that was trained by itself, at its start and of its best step."""
    figure, axes = _figure(1)
    numbers = range(len(blocks))
    axes[0].plot(numbers, [block["start"] for block in blocks], marker=".", color="#8c8c8c", label="start")
    axes[0].plot(numbers, [block["best"] for block in blocks], marker=".", color="#1f77b4", label="trained")
    axes[0].set(title="held-out error of the block's outputs", xlabel="block", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return _encoded(figure, axes)


def _loss(recovery: Mapping[str, Any]) -> str:
    """The loss on the batches, where it is another one than on held-out text."""
    objective = summary(recovery["recipe"]).objective
    return "" if objective in ("next-token", "block") else f" ({objective})"


def _figure(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many plots side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE
    figure = Figure(figsize=(width if count > 1 else 0.55 * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _encoded(figure: Any, axes: Sequence[Any]) -> str:
    for one in axes:
        one.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode()
