"""Draws the plots beside the report, for papers and cards: matrices by block, a training by step. PNGs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.checkpoint.contents import MATRIX_PLOT, TRAINING_PLOT
from llmprune.checkpoint.files import write_durably
from llmprune.recipe.summary import summary
from llmprune.record.canvas import canvas, png
from llmprune.record.grouping import grid_of

Rows = Sequence[Mapping[str, Any]]
_SIZE = (9, 3.4)


def draw(folder: Path, record: Mapping[str, Any]) -> None:
    """Draw the plots of a record into a folder, where they are not there yet: scores change none of them."""
    for name, plot in ((MATRIX_PLOT, _matrices), (TRAINING_PLOT, _training)):
        if not (folder / name).is_file() and (found := plot(record)) is not None:
            write_durably(folder / name, [found])


def _matrices(record: Mapping[str, Any]) -> bytes | None:
    return matrix_plot(record["matrices"]) if record["matrices"] else None


def _training(record: Mapping[str, Any]) -> bytes | None:
    """Plots of a training by step or by block; None where there is nothing to draw."""
    recovery = record.get("recovery", {})
    if recovery.get("curve"):
        return curve_plot(recovery)
    return block_plot(recovery["blocks"]) if recovery.get("blocks") else None


def matrix_plot(matrices: Rows) -> bytes:
    """Relative error (where it is known) and sparsity by block, a line per kind of matrix."""
    grid = grid_of(matrices)
    errors = any(group.errors for group in grid.groups.values())
    figure, axes = _figure(2 if errors else 1)
    for kind in grid.kinds:  # of experts the mean
        found = {n: grid.groups[b, kind] for n, b in enumerate(grid.blocks) if (b, kind) in grid.groups}
        known = {n: error for n, group in found.items() if (error := group.error) is not None}
        if errors:
            axes[0].plot(list(known), list(known.values()), marker=".", label=kind)
        axes[-1].plot(list(found), [group.sparsity for group in found.values()], marker=".", label=kind)
    if errors:
        axes[0].set(title="relative output error", xlabel="block", ylim=(0, None))
    axes[-1].set(title="sparsity", xlabel="block", ylim=(0, 1))
    axes[-1].legend(fontsize=7, ncols=2)
    return _png(figure, axes)


def curve_plot(recovery: Mapping[str, Any]) -> bytes:
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
    return _png(figure, axes)


def block_plot(blocks: Rows) -> bytes:
    """The held-out error of every block that was trained by itself, at its start and of its best step."""
    figure, axes = _figure(1)
    numbers = range(len(blocks))
    axes[0].plot(numbers, [block["start"] for block in blocks], marker=".", color="#8c8c8c", label="start")
    axes[0].plot(numbers, [block["best"] for block in blocks], marker=".", color="#1f77b4", label="trained")
    axes[0].set(title="held-out error of the block's outputs", xlabel="block", ylim=(0, None))
    axes[0].legend(fontsize=8)
    return _png(figure, axes)


def _loss(recovery: Mapping[str, Any]) -> str:
    """The loss on the batches, where it is another one than on held-out text."""
    objective = summary(recovery["recipe"]).objective
    return "" if objective in ("next-token", "block") else f" ({objective})"


def _figure(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many plots side by side."""
    width, height = _SIZE
    return canvas((width if count > 1 else 0.55 * width, height), 1, count)


def _png(figure: Any, axes: Sequence[Any]) -> bytes:
    for one in axes:
        one.grid(alpha=0.3)
    return png(figure)
