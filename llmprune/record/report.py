"""Writes the record (`llmprune.json`) of an output folder, and from it its model card and HTML report."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmprune.checkpoint.contents import CARD, RECORD, REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.common.messages import size_text
from llmprune.record.card import as_yaml, load_snippet, model_card, protocol_lines
from llmprune.record.figures import (
    Record,
    masks_given,
    method_of,
    score_table,
    seconds_by_phase,
    size_remark,
    sizes_on_disk,
    sparsity_reached,
    speed_measured,
)
from llmprune.record.history import pruned_here
from llmprune.record.plots import encoded_blocks, encoded_curves, encoded_matrices
from llmprune.record.record import calibrated_on
from llmprune.record.recovered import advice, training_rows
from llmprune.record.repeating import repetition


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
        *(training_rows(record) if "recovery" in record else []),
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
td, th { text-align: left; vertical-align: top } td:not(:last-child), th { white-space: nowrap }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } summary { cursor: pointer }
img { max-width: 100% } h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }"""


def html_report(record: Record, name: str) -> str:
    """The report: one page with summary, scores, plots (embedded) and a table of all matrices.

    `name` is the folder's, without its path.
    """
    head, scores = score_table(record)
    no_scores = "<p>Not scored: made without evaluation.</p>"
    parts = [
        f"<h1>{html.escape(record['model']['source'])}, {record['totals']['sparsity']:.1%} sparse</h1>",
        _table((), _summary(record)),
        "<h2>Scores</h2>",
        _table(head, scores) if scores else no_scores,
        *(f"<p>{html.escape(line)}</p>" for line in protocol_lines(record)),
        f"<p>{html.escape(size_remark(record))}</p>",
        *_training(record),
        "<h2>Load</h2>",
        f"<pre>{html.escape(load_snippet(name, record))}</pre>",
        *_recipe(record),
        "<h2>Matrices</h2>",
        *_matrices(record),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llmprune report</title><style>
{_STYLE}
</style></head><body>
{chr(10).join(parts)}
</body></html>
"""


def _training(record: Record) -> list[str]:
    """The section on a recovery: curves, text, recipe, and how to repeat it."""
    if "recovery" not in record:
        return []
    recovery, again = record["recovery"], repetition(record)
    told, digests = advice(record), f"Digest of the tokens {recovery['text']['digest']}, "
    digests += f"of the start {recovery['start']['digest']}."
    commands = [f"<pre>{html.escape(chr(10).join(again.commands))}</pre>"] if again.commands else []
    return [
        "<h2>Training</h2>",
        *([f"<p>{html.escape(told)}</p>"] if told else []),
        *_image("the course of the training", _curves(recovery)),
        f"<p>{html.escape(digests)}</p>",
        _folded("The recipe of the training with every default", recovery["recipe"]),
        "<p>To train it again:</p>",
        *commands,
        *(f"<p>{html.escape(line)}</p>" for line in again.needed),
    ]


def _recipe(record: Record) -> list[str]:
    """The recipe of the pruning, where the record has one."""
    if "recovery" in record and not pruned_here(record):
        return []
    title = "The recipe of the pruning" if "recovery" in record else "The recipe"
    return [_folded(f"{title} with every default", record["recipe"])]


def _folded(title: str, recipe: Record) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(as_yaml(recipe))}</pre></details>"


def _image(alt: str, encoded: str | None) -> list[str]:
    return [] if encoded is None else [f'<img alt="{alt}" src="data:image/png;base64,{encoded}">']


def _matrices(record: Record) -> list[str]:
    """Plot and table of all matrices; without the column of errors where none was measured."""
    matrices = record["matrices"]
    plot, rows = _plot(matrices), [_matrix_row(matrix) for matrix in matrices]
    columns = ("matrix", "shape", "pattern", "sparsity", "relative error", "steps")
    if _measured(matrices):
        image = _image("sparsity and relative error per matrix", plot)
        return [*image, f"<p>{_legend(record)}</p>", _table(columns, rows)]
    place = columns.index("relative error")
    narrow = [[*row[:place], *row[place + 1 :]] for row in (columns, *rows)]
    return [*_image("sparsity per matrix", plot), _table(narrow[0], narrow[1:])]


def _measured(matrices: Iterable[Record]) -> bool:
    """Whether the relative error of any matrix is known."""
    return any(matrix["relative_error"] is not None for matrix in matrices)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cells(tag: str, values: Iterable[object]) -> str:
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    names = cells("th", head)
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>{f'<tr>{names}</tr>' if names else ''}\n{body}</table>"


def _curves(recovery: Record) -> str | None:
    """Plots of a training by step or by block, encoded in base64; None where there is nothing to draw."""
    if recovery.get("curve"):
        return encoded_curves(recovery)
    return encoded_blocks(recovery["blocks"]) if recovery.get("blocks") else None


def _plot(matrices: list[dict[str, Any]]) -> str:
    """Plots of relative error and sparsity by block, a line per kind of matrix; a PNG, encoded in base64."""
    return encoded_matrices(matrices, _measured(matrices))
