"""Writes the record (`llmprune.json`) of an output folder, and from it its model card and HTML report."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprune.checkpoint.contents import CARD, RECORD, REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.common.messages import size_text
from llmprune.record.card import as_yaml, load_snippet, model_card, protocol_lines, with_error
from llmprune.record.figures import (
    Record,
    masks_given,
    method_of,
    score_rows,
    seconds_by_phase,
    size_remark,
    sizes_on_disk,
    sparsity_reached,
    speed_measured,
)
from llmprune.record.record import calibrated_on


def write(folder: Path, record: Record, name: str, before: Record | None = None) -> bool:
    """Write record, model card and report into a folder. Each file is written completely or not at all.

    Args:
        name: what the folder will be called.
        before: the record from which the card in the folder was made; if the card was edited since, it is
            kept.

    Returns:
        Whether the card was written.
    """
    texts = {
        CARD: model_card(record, name),
        REPORT: html_report(record, name),
        RECORD: json.dumps(record, indent=1) + "\n",
    }
    card = folder / CARD
    made = model_card(before, name).encode() if before is not None and card.is_file() else None
    edited = made is not None and card.read_bytes() != made
    for file, text in texts.items():
        if not (edited and file == CARD):
            write_durably(folder / file, [text.encode()])
    return not edited


def write_record(folder: Path, record: Record) -> None:
    """Write the record alone, where there is no run to report on."""
    write_durably(folder / RECORD, [(json.dumps(record, indent=1) + "\n").encode()])


def _choices(record: Record) -> list[tuple[str, str]]:
    """Rows on what chose the masks: why this recipe, masks that were given, what its allocator measured."""
    recipe = record["recipe"]
    rows = [("recipe", recipe["chosen"])] if recipe.get("chosen") else []
    rows += [("masks", masks_given(record))] if "masks" in record else []
    for what, measured in record.get("allocation", {}).items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        rows.append((f"{recipe['allocator']['name']}: {what}", values))
    return rows


def _steps_of(matrix: Record) -> str:
    """The steps a matrix went through; after tuning also the block's held-out error before and after it."""
    steps = " + ".join([matrix["pruner"], *matrix["steps"]])
    tune = matrix.get("tune")
    if not tune:
        return steps
    if not tune["applied"]:
        return f"{steps} (no gain, not applied)"
    return f"{steps} ({tune['held_out_before']:.3g} to {tune['held_out_after']:.3g})"


def _legend(record: Record) -> str:
    """What the numbers in the table of matrices are."""
    error = (
        "Relative error: of a matrix's outputs on calibration inputs, the squared change over the squared "
        "outputs of the dense matrix."
    )
    if any("tune" in m for m in record["matrices"]):
        error += (
            " In brackets: the same of the whole block's outputs on calibration rows held out from its "
            "tuning, before and after it."
        )
    return error


def _summary(record: Record) -> list[tuple[str, str]]:
    """The rows of the table at the top of the report."""
    model, totals, environment = record["model"], record["totals"], record["environment"]
    rows = "{samples} x {sequence_length} tokens".format(**record["calibration"])
    calibrated = bool(record["calibration"]["samples"])
    source, seed = calibrated_on(record["calibration"]), record["calibration"]["seed"]
    return [
        ("model", f"{model['source']} ({model['parameters']:,} parameters)"),
        ("method", method_of(record)),
        *_choices(record),
        ("sparsity reached", sparsity_reached(record)),
        ("calibration", f"{rows} of {source}, seed {seed}" if calibrated else "none"),
        ("weights on disk", sizes_on_disk(record)),
        *_speed(record),
        ("peak memory", size_text(totals["peak_memory_bytes"])),
        ("seconds", seconds_by_phase(record)),
        ("device", f"{environment['device']}, {environment['dtype']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
    ]


def _speed(record: Record) -> list[tuple[str, str]]:
    """The row on speed, where it was measured, and on which processor."""
    said = speed_measured(record)
    processor = record.get("speed", {}).get("processor")
    return [("speed", f"{said} on {processor}" if processor else said)] if said else []


def _error_text(error: float | None) -> str:
    """A relative error; a matrix that no token has reached has none."""
    return "-" if error is None else f"{error:.4f}"


def _matrix_row(matrix: Record) -> tuple[str, ...]:
    shape = " x ".join(map(str, matrix["shape"]))
    sparsity, error = f"{matrix['sparsity']:.4f}", _error_text(matrix["relative_error"])
    return matrix["name"], shape, matrix["pattern"], sparsity, error, _steps_of(matrix)


_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; \
padding: 0 1rem; color: #1c1c1c }
table { border-collapse: collapse; margin: 1rem 0 } \
td, th { border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0 }
td, th { text-align: left; vertical-align: top } td:first-child { white-space: nowrap }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } summary { cursor: pointer }
img { max-width: 100% } h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }"""


def html_report(record: Record, name: str) -> str:
    """The report: one page with summary, scores, plots (embedded) and a table of all matrices.

    `name` is the folder's, without its path.
    """
    scores = [(s.name, s.dense, with_error(s), s.change, s.note) for s in score_rows(record)]
    no_scores = "<p>Not scored: made without evaluation.</p>"
    recipe, plot = html.escape(as_yaml(record["recipe"])), _plot(record["matrices"])
    columns = ("matrix", "shape", "pattern", "sparsity", "relative error", "steps")
    parts = [
        f"<h1>{html.escape(record['model']['source'])}, {record['totals']['sparsity']:.1%} sparse</h1>",
        _table((), _summary(record)),
        "<h2>Scores</h2>",
        _table(("", "dense", "pruned", "change", ""), scores) if scores else no_scores,
        *(f"<p>{html.escape(line)}</p>" for line in protocol_lines(record)),
        f"<p>{html.escape(size_remark(record))}</p>",
        "<h2>Load</h2>",
        f"<pre>{html.escape(load_snippet(name, record))}</pre>",
        f"<details><summary>The recipe with every default</summary><pre>{recipe}</pre></details>",
        "<h2>Matrices</h2>",
        f'<img alt="sparsity and relative error per matrix" src="data:image/png;base64,{plot}">',
        f"<p>{_legend(record)}</p>",
        _table(columns, map(_matrix_row, record["matrices"])),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llmprune report</title><style>
{_STYLE}
</style></head><body>
{chr(10).join(parts)}
</body></html>
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cells(tag: str, values: Iterable[object]) -> str:
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    names = cells("th", head)
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>{f'<tr>{names}</tr>' if names else ''}\n{body}</table>"


def _plot(matrices: list[dict[str, Any]]) -> str:
    """Plots of relative error and sparsity by block, a line per kind of matrix; a PNG, encoded in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    errors, sparsities = figure.subplots(1, 2)
    kinds: dict[str, dict[int, list[Record]]] = {}
    for matrix in matrices:
        parts = matrix["name"].removesuffix(".weight").split(".")
        kind = next((part for part in reversed(parts) if not part.isdigit()), "")
        block = next((int(part) for part in parts if part.isdigit()), 0)
        kinds.setdefault(kind, {}).setdefault(block, []).append(matrix)
    for kind, blocks in kinds.items():  # of experts the mean
        known = {b: [e for m in rows if (e := m["relative_error"]) is not None] for b, rows in blocks.items()}
        means = {b: sum(found) / len(found) for b, found in known.items() if found}
        errors.plot(list(means), list(means.values()), marker=".", label=kind)
        zeros = [sum(m["sparsity"] for m in rows) / len(rows) for rows in blocks.values()]
        sparsities.plot(list(blocks), zeros, marker=".", label=kind)
    errors.set(title="relative output error", xlabel="block", ylim=(0, None))
    sparsities.set(title="sparsity", xlabel="block", ylim=(0, 1))
    for axes in (errors, sparsities):
        axes.grid(alpha=0.3)
    sparsities.legend(fontsize=7, ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode()
