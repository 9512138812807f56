"""From the record to the files people read: `llmprune.json`, the model card and the HTML report."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmprune.calibration.mixture import is_file, plain_sources
from llmprune.checkpoint.contents import CARD, RECORD, REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.data import size_text
from llmprune.record import calibrated_on
from llmprune.words import ScoreRow, score_rows, seconds_by_phase, share_of_all, sparsity_reached

HONEST = (
    "The weights are stored densely, zeros included: as they are, this model is neither smaller on disk nor faster than the original. "
    "Runtimes that use the zeros (2:4 kernels, sparse formats, compression) can make it so."
)
Record = dict[str, Any]


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
    edited = before is not None and (folder / CARD).is_file() and (folder / CARD).read_bytes() != model_card(before, name).encode()
    for file, text in texts.items():
        if not (edited and file == CARD):
            write_durably(folder / file, [text.encode()])
    return not edited


def method_of(record: Record) -> str:
    """The method in words: recipe, pruner, steps, pattern and what else is not as usual."""
    recipe = record["recipe"]
    steps = " + ".join(s["name"] for s in (recipe["pruner"], recipe["refiner"], *recipe.get("update", [])) if s)
    allocator = recipe.get("allocator", {"name": "uniform"})["name"]
    shared = f", sparsity shared out by {allocator}" if allocator != "uniform" else ""
    permuted = ", channels permuted" if recipe.get("permute") else ""
    return f"{steps}, {recipe['pattern']}{shared}{permuted} (recipe {recipe['name']})"


def _choices(record: Record) -> list[tuple[str, str]]:
    """What the program chose itself, and on what grounds."""
    rows = [("recipe", record["recipe"]["chosen"])] if record["recipe"].get("chosen") else []
    for what, measured in record.get("allocation", {}).items():
        rows.append((f"{record['recipe']['allocator']['name']}: {what}", ", ".join(f"{k} {v:.4g}" for k, v in measured.items())))
    return rows


def _steps_of(matrix: Record) -> str:
    """The steps a matrix went through, with what the block's held-out error was before and after its tuning."""
    told = " + ".join([matrix["pruner"], *matrix["steps"]])
    if tune := matrix.get("tune"):
        told += f" ({tune['held_out_before']:.3g} to {tune['held_out_after']:.3g})" if tune["applied"] else " (no gain, not applied)"
    return told


def _legend(record: Record) -> str:
    """What the numbers of the table of matrices are."""
    error = "Relative error: of a matrix's outputs on calibration inputs, the squared change over the squared outputs of the dense matrix."
    if any("tune" in m for m in record["matrices"]):
        error += " In brackets: the same of the whole block's outputs on calibration rows held out from its tuning, before and after it."
    return error


def protocol_lines(record: Record) -> list[str]:
    """How the scores were measured, a line per protocol that differs."""
    versions, lines = record["environment"]["versions"], []
    for entry in record["evaluation"]["perplexity"].values():
        protocol = entry["protocol"]
        lines.append(f"perplexity: {protocol['mean']}; documents joined, no overlap; forward passes in {protocol['dtype']}")
    if record["evaluation"]["tasks"]:
        lines.append("+- is a standard error; a change of at most two of them is called within its error")
    for task, metrics in record["evaluation"]["tasks"].items():
        protocol = metrics["protocol"]
        lines.append(f"{task}: lm-eval {versions['lm_eval']}, task version {protocol['version']}, {protocol['shots']} shots")
    return list(dict.fromkeys(lines))


def model_card(record: Record, name: str) -> str:
    """The folder's README: what it is, what it scores, how it was made, how to load it, under which licence.

    `name` is that of the folder, without its path, or of the repository; `published` puts another in its place.
    """
    model, totals, calibration = record["model"], record["totals"], record["calibration"]
    source = " ".join(model["source"].split())
    at = f" (commit `{model['revision']}`)" if model["revision"] else ""
    return f"""---
{_front_matter(record)}---

# {source.rpartition("/")[2]}, {totals["sparsity"]:.1%} sparse

{source}{at} pruned after training, without retraining, by llmprune: {method_of(record)}.
{totals["zeros"]:,} of {totals["weights"]:,} weights in the pruned matrices are zero, {share_of_all(record)}; \
embeddings, norms and the output head are not pruned.

{HONEST}

## Scores

{_scores_section(record)}
## Recipe

Calibrated on {calibration["samples"]} x {calibration["sequence_length"]} tokens of {calibrated_on(calibration)}, \
seed {calibration["seed"]}, tokens `{calibration["digest"]}`.

<details><summary>The recipe with every default</summary>

```yaml
{_yaml(record["recipe"])}```

</details>
{_again(record)}
## Load

```python
{load_snippet(name)}
```

`masks.safetensors` holds the keep masks, `llmprune.json` the full record (recipe, calibration fingerprint, every matrix, versions).
`llmprune inspect` recounts the zeros.

## Licence

{_licence_section(model)}
"""


def load_snippet(name: str) -> str:
    """How transformers loads a folder or repository."""
    quoted = json.dumps(name, ensure_ascii=False)
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({quoted})"""


def published(card: str, repository: str, revision: str | None) -> str:
    """A card, perhaps edited by hand, that loads from a repository: in the section Load, whatever the folder was called."""
    at = f', revision="{revision}"' if revision else ""
    before, heading, after = card.partition("\n## Load\n")
    section, fence, rest = after.partition("\n```\n")
    section = re.sub(r'(?<=\.from_pretrained\()"(?:[^"\\\n]|\\.)*"', lambda _: f'"{repository}"{at}', section)
    return (before + heading + section + fence + rest).replace('"PATH_OR_ID"', f'"{repository}"{at}')


def _again(record: Record) -> str:
    """The command that repeats the run, where what it needs can be had elsewhere."""
    model, source = record["model"], record["calibration"]["source"]
    if (
        not ("/" in model["source"] or model["source"] == "demo")
        or source.endswith("in memory")
        or any(map(is_file, plain_sources(source)))
    ):
        return ""
    revision = f" --revision {model['revision']}" if model["revision"] else ""
    return f"\nSaved as `recipe.yaml`, it does the same again: `llmprune prune {model['source']}{revision} --recipe recipe.yaml`.\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=1000)


def _front_matter(record: Record) -> str:
    """What the hub reads. The licence is the source's own word, or absent."""
    model = record["model"]
    licence = {key: model.get(key) for key in ("license", "license_name", "license_link")}
    fields = {
        "base_model": model["source"] if "/" in model["source"] else None,
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmprune", "pruned", "sparse"],
    }
    return _yaml({key: value for key, value in fields.items() if value is not None})


def _scores_section(record: Record) -> str:
    scores = score_rows(record)
    if not scores:
        return "Not scored: made with `llmprune prune`.\n"
    table = "\n".join(f"| {s.name} | {s.dense} | {_with_error(s)} | {s.change} | {s.note} |" for s in scores)
    protocols = "\n".join(f"- {line}" for line in protocol_lines(record))
    return f"| | dense | pruned | change | |\n|---|---|---|---|---|\n{table}\n\nDense and pruned were measured alike:\n\n{protocols}\n"


def _with_error(row: ScoreRow) -> str:
    return f"{row.pruned} {row.error}".rstrip()


def _licence_section(model: dict[str, Any]) -> str:
    if model.get("license") is None:
        return "The licence is the base model's. Its card names none or was not at hand: look it up before you share this model."
    more = ", ".join(model[key] for key in ("license_name", "license_link") if model.get(key))
    return f"The licence is the base model's: `{model['license']}`{f' ({more})' if more else ''}, as the base model's own card says."


def html_report(record: Record, name: str) -> str:
    """One page with the summary, the scores and a plot per matrix; plots are embedded. `name`: the folder's, without its path."""
    totals, calibration = record["totals"], record["calibration"]
    summary = [
        ("model", f"{record['model']['source']} ({record['model']['parameters']:,} parameters)"),
        ("method", method_of(record)),
        *_choices(record),
        ("sparsity reached", sparsity_reached(record)),
        ("calibration", "{samples} x {sequence_length} tokens of {on}, seed {seed}".format(on=calibrated_on(calibration), **calibration)),
        ("weights on disk", f"{size_text(totals['bytes']['dense'])} dense, {size_text(totals['bytes']['written'])} written"),
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
    scores = [(s.name, s.dense, _with_error(s), s.change, s.note) for s in score_rows(record)]
    parts = [
        f"<h1>{html.escape(record['model']['source'])}, {totals['sparsity']:.1%} sparse</h1>",
        _table((), summary),
        "<h2>Scores</h2>",
        _table(("", "dense", "pruned", "change", ""), scores) if scores else "<p>Not scored: made with llmprune prune.</p>",
        *(f"<p>{html.escape(line)}</p>" for line in protocol_lines(record)),
        f"<p>{html.escape(HONEST)}</p>",
        "<h2>Load</h2>",
        f"<pre>{html.escape(load_snippet(name))}</pre>",
        f"<details><summary>The recipe with every default</summary><pre>{html.escape(_yaml(record['recipe']))}</pre></details>",
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
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>\n" for row in rows)
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
        kinds.setdefault(m["name"].removesuffix(".weight").rpartition(".")[2], []).append((m["relative_error"], m["sparsity"]))
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
