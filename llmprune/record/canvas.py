"""A figure of matplotlib that needs no screen, and its PNG: what all plots begin and end with."""

from __future__ import annotations

import io
from typing import Any


def canvas(
    size: tuple[float, float], rows: int = 1, columns: int = 1, grid: dict[str, Any] | None = None
) -> tuple[Any, list[Any]]:
    """A figure of so many inches and its plots, row by row. `grid`: as `gridspec_kw` of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flat)


def png(figure: Any, dpi: int = 150, software: str | None = None) -> bytes:
    """The figure as PNG, without a date. `software`: what made it, for the metadata."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": software})
    return out.getvalue()
