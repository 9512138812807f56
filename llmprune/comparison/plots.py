"""The plots of a comparison, for papers: scores over sparsity, and over bytes per parameter. PNGs."""

from __future__ import annotations

from llmprune.comparison import tables
from llmprune.comparison.comparing import Comparison
from llmprune.record.canvas import canvas, png

_MARKS = "os^DPv*X<>"


def plot(comparison: Comparison, across: str) -> bytes | None:
    """A PNG with a plot for every group of figures whose runs lie apart; None where there is none.

    Args:
        comparison: what `compared` returns.
        across: a key of `ACROSS`.
    """
    found = tables.curves(comparison, across)
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = canvas((4.6 * columns, 3.6 * rows), rows, columns)
    for one, (title, series) in zip(axes, found, strict=False):
        for number, (label, points) in enumerate(series.items()):
            x, y, errors = ([point[place] for point in points] for place in range(3))
            mark = _MARKS[number % len(_MARKS)]
            style = {"marker": mark, "markersize": 4, "linestyle": "--" if label == "dense" else "-"}
            one.errorbar(x, y, errors if any(errors) else None, label=label, **style)
        one.set(
            title=title,
            xlabel=tables.ACROSS[across],
            **({"yscale": "log"} if title.startswith("perplexity") else {}),
        )
        one.grid(alpha=0.3, which="both")
        one.legend(fontsize=7)
    for unused in axes[len(found) :]:
        unused.set_axis_off()
    return png(figure)
