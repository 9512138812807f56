"""The summary and the table of `families.py`."""

from __future__ import annotations

KINDS = ("works", "refused", "fails", "not built", "same as")
INTRO = """# Model families

Written by `.venv/bin/python eval/bench/families.py --markdown docs/families.md`, with transformers {version}.
A tiny random model of every class that transformers maps for causal language models, and for images and text
to text, is built, saved, pruned to 50 % (Wanda) and to 2:4 (SparseGPT) in float32, loaded by plain
transformers and recounted. Logits block by block must be those of the whole model. torch {torch}.

{summary}

"Not built" are models that transformers itself cannot run here on tokens alone: most need an image; what
llmprune says of them follows. "Targets" is the share of all weights, embeddings and towers for images
included, that is in prunable matrices. "Dense" are matrices inside the blocks that are no targets: routers,
state, stacked vectors, and what several blocks share. The seconds are those of all this on two cores.

| model type | class | result | targets | dense in the blocks | seconds |
|---|---|---|---|---|---|
"""


def kind(found):
    """The first word or two of a result."""
    return next(k for k in KINDS if found["result"].startswith(k))


def summary(results):
    counts = {k: sum(kind(r) == k for r in results) for k in KINDS}
    different = len(results) - counts["same as"]
    return (
        f"{different} families: {different - counts['not built']} built, {counts['works']} work, "
        f"{counts['refused']} refused, {counts['fails']} fail, {counts['not built']} not built"
    )


def _short(text, width=160):
    """A text for a table cell, cut off at the end of a word."""
    text = text.replace("|", "\\|").replace("<", "\\<")
    return text if len(text) <= width else f"{text[:width].rpartition(' ')[0]} …"


def markdown(results):
    import torch
    import transformers

    rows = []
    for found in results:
        share = f"{found['share']:.0%}" if "share" in found else ""
        said = _short(found["result"]) + (f"; llmprune {_short(found['told'])}" if "told" in found else "")
        dense = ", ".join(sorted({_kind_of(name) for name in found.get("dense_in_blocks", ())}))
        cells = (found["model_type"], found["class"], said, share, dense, f"{found['seconds']:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    versions = {"version": transformers.__version__, "torch": torch.__version__}
    return INTRO.format(**versions, summary=summary(results)) + "\n".join(rows) + "\n"


def _kind_of(name):
    """The end of a parameter's name: the same in all blocks."""
    return ".".join(part for part in name.removesuffix(".weight").split(".")[-2:] if not part.isdigit())
