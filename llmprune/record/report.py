"""From the record to the files people read: `llmprune.json`, the model card and the HTML report."""

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
from llmprune.record.figures import HONEST, Record, method_of, score_rows, seconds_by_phase, sparsity_reached
from llmprune.record.record import calibrated_on


def write(folder: Path, record: Record, name: str, before: Record | None = None) -> bool:
    """Write record, model card and report into a folder, each whole or not at all; returns whether the card was written.

    Args:
        name: what the folder will be called. before: the record that the card there was made from; if it was edited since, it stays.
    """
    texts = {
        CARD: model_card(record, name),
        REPORT: html_report(record, name),
        RECORD: json.dumps(record, indent=1) + "\n",
    }
    edited = (
        before is not None
        and (folder / CARD).is_file()
        and (folder / CARD).read_bytes() != model_card(before, name).encode()
    )
    for file, text in texts.items():
        if not (edited and file == CARD):
            write_durably(folder / file, [text.encode()])
    return not edited


def _choices(record: Record) -> list[tuple[str, str]]:
    """What the program chose itself, and on what grounds."""
    rows = [("recipe", record["recipe"]["chosen"])] if record["recipe"].get("chosen") else []
    for what, measured in record.get("allocation", {}).items():
        rows.append(
            (
                f"{record['recipe']['allocator']['name']}: {what}",
                ", ".join(f"{k} {v:.4g}" for k, v in measured.items()),
            )
        )
    return rows


def _steps_of(matrix: Record) -> str:
    """The steps a matrix went through, with what the block's held-out error was before and after its tuning."""
    told = " + ".join([matrix["pruner"], *matrix["steps"]])
    if tune := matrix.get("tune"):
        told += (
            f" ({tune['held_out_before']:.3g} to {tune['held_out_after']:.3g})"
            if tune["applied"]
            else " (no gain, not applied)"
        )
    return told


def _legend(record: Record) -> str:
    """What the numbers of the table of matrices are."""
    error = "Relative error: of a matrix's outputs on calibration inputs, the squared change over the squared outputs of the dense matrix."
    if any("tune" in m for m in record["matrices"]):
        error += " In brackets: the same of the whole block's outputs on calibration rows held out from its tuning, before and after it."
    return error


def html_report(record: Record, name: str) -> str:
    """One page with the summary, the scores and a plot per matrix; plots are embedded. `name`: the folder's, without its path."""
    totals, calibration = record["totals"], record["calibration"]
    summary = [
        ("model", f"{record['model']['source']} ({record['model']['parameters']:,} parameters)"),
        ("method", method_of(record)),
        *_choices(record),
        ("sparsity reached", sparsity_reached(record)),
        (
            "calibration",
            "{samples} x {sequence_length} tokens of {on}, seed {seed}".format(
                on=calibrated_on(calibration), **calibration
            ),
        ),
        (
            "weights on disk",
            f"{size_text(totals['bytes']['dense'])} dense, {size_text(totals['bytes']['written'])} written",
        ),
        ("peak memory", size_text(totals["peak_memory_bytes"])),
        ("seconds", seconds_by_phase(record)),
        ("device", f"{record['environment']['device']}, {record['environment']['dtype']}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record["environment"]["versions"].items())),
    ]
    matrices = [
        (
            m["name"],
            " x ".join(map(str, m["shape"])),
            m["pattern"],
            f"{m['sparsity']:.4f}",
            f"{m['relative_error']:.4f}",
            _steps_of(m),
        )
        for m in record["matrices"]
    ]
    scores = [(s.name, s.dense, with_error(s), s.change, s.note) for s in score_rows(record)]
    parts = [
        f"<h1>{html.escape(record['model']['source'])}, {totals['sparsity']:.1%} sparse</h1>",
        _table((), summary),
        "<h2>Scores</h2>",
        _table(("", "dense", "pruned", "change", ""), scores)
        if scores
        else "<p>Not scored: made with llmprune prune.</p>",
        *(f"<p>{html.escape(line)}</p>" for line in protocol_lines(record)),
        f"<p>{html.escape(HONEST)}</p>",
        "<h2>Load</h2>",
        f"<pre>{html.escape(load_snippet(name))}</pre>",
        f"<details><summary>The recipe with every default</summary><pre>{html.escape(as_yaml(record['recipe']))}</pre></details>",
        "<h2>Matrices</h2>",
        f'<img alt="sparsity and relative error per matrix" src="data:image/png;base64,{_plot(record["matrices"])}">',
        f"<p>{_legend(record)}</p>",
        _table(("matrix", "shape", "pattern", "sparsity", "relative error", "steps"), matrices),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llmprune report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .8rem .25rem 0 }}
td, th {{ text-align: left; vertical-align: top }} td:first-child {{ white-space: nowrap }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto }} summary {{ cursor: pointer }}
img {{ max-width: 100% }} h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.2rem; margin-top: 2rem }}
</style></head><body>
{chr(10).join(parts)}
</body></html>
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>\n" for row in rows
    )
    return f"<table>{'<tr>' + cells + '</tr>' if cells else ''}\n{body}</table>"


def _plot(matrices: list[dict[str, Any]]) -> str:
    """Relative error and sparsity along the network, one line per kind of matrix; PNG as base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    errors, sparsities = figure.subplots(1, 2)
    kinds: dict[str, list[tuple[float, float]]] = {}
    for m in matrices:
        kinds.setdefault(m["name"].removesuffix(".weight").rpartition(".")[2], []).append(
            (m["relative_error"], m["sparsity"])
        )
    for kind, values in kinds.items():
        errors.plot([v[0] for v in values], marker=".", label=kind)
        sparsities.plot([v[1] for v in values], marker=".", label=kind)
    errors.set(title="relative output error", xlabel="block", ylim=(0, None))
    sparsities.set(title="sparsity", xlabel="block", ylim=(0, 1))
    for axes in (errors, sparsities):
        axes.grid(alpha=0.3)
    sparsities.legend(fontsize=7, ncols=2)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode()
