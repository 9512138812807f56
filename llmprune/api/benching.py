"""The Python function `bench`: size, memory and speed of a checkpoint on this CPU, dense against packed."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from llmprune.api import perplexities
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.conversion import convert
from llmprune.api.reporting import reporting
from llmprune.api.whole import PROCESS, TOKENS, Whole
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.reader import Checkpoint
from llmprune.common.messages import shown, size_text
from llmprune.contracts import VALUES
from llmprune.kernels import library
from llmprune.machine import device as devices
from llmprune.machine import processes
from llmprune.machine.processor import cache_bytes, processor_name, share_at_work
from llmprune.model.opening import Model, OpenOptions, open_model
from llmprune.record import drawing
from llmprune.run.reporter import RunReporter
from llmprune.runtime.bench import CONTESTANTS, Enough, Matrices, products

_PRODUCTS = 0.4  # of the seconds; the whole model takes the others


@checked()
def bench(
    path: AnyPath,
    *,
    values: str = "same",
    seconds: float = 60.0,
    products_only: bool = False,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    eval_seqlen: int | None = None,
    limit: int | None = None,
    plot: AnyPath | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on this machine's CPU, dense against packed: size, memory, speed, perplexity.

    The form that `path` is not in is written to the folder for temporary files (`TMPDIR`), and removed
    afterwards.

    Args:
        path: `demo`, an alias, a hub id or a folder: pruned and dense, or packed.
        values: how kept values of a dense checkpoint are packed: `same`, `int8` or `int4`.
        seconds: for measuring speed; loading, writing and scoring come on top.
        products_only: measure the products of the matrices alone: no whole model is written or loaded.
        perplexity: texts as for `evaluate`; `none` for none. Without any, those of the record, else
            `builtin`.
        eval_seqlen: tokens per evaluation window; None as for `evaluate`.
        limit: at most so many windows per text; None for as many as the record has, else 8.
        plot: the PNG file to draw; None for none.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A dict with `model`, `format` (of `path`), `values`, `machine`, `bytes`, `products`, `whole` (None
        with `products_only`), `perplexity`, `plot` and `seconds`; docs/bench.md has them in full.

    Raises:
        ValueError: bad input, nothing sparse, or too little room, before any long work.
    """
    texts = cast("Sequence[str]", perplexity)  # as `checked` makes them
    started, picture = time.monotonic(), Path(plot).expanduser() if plot else None
    wanted = _wanted(values, seconds, picture, perplexities.wanted(texts, eval_seqlen, limit))
    how = OpenOptions(
        device="cpu", revision=revision, trust_remote_code=trust_remote_code, blocks=blocks, dtype="auto"
    )
    model = open_model(path, how)
    packed = isinstance(model.source, Packed)
    if packed and values != "same":
        raise ValueError(f"{path} is packed already; values {values} are for dense folders, leave them out")
    scores = perplexities.prepared(wanted, model, rounded=not packed and values != "same")
    if not products_only:
        _check_room(model)
    matrices = Matrices(model.skeleton, model.source, VALUES[values])
    if not matrices.any_packed():
        raise ValueError(
            f"{path} has no sparse matrix, so there is nothing to compare: prune it first, or pack all its "
            "weights with --values int8 or int4"
        )
    about = machine()
    with reporting(reporter, progress, processes.ALONE) as report, contextlib.ExitStack() as stack:
        of_products = _products(matrices, seconds if products_only else seconds * _PRODUCTS, report)
        forms = None if products_only else stack.enter_context(_forms(path, model, values, report))
        whole = forms and Whole(model, forms, report).measured(seconds * (1 - _PRODUCTS))
        opening = functools.partial(open_model, forms["packed"], how) if forms else None
        found = {
            "model": model.label,
            "format": "packed" if packed else "dense",
            "values": model.source.values if isinstance(model.source, Packed) else values,
            "machine": about,
            "bytes": _sizes(matrices, forms, model),
            "products": of_products,
            "whole": whole,
            "perplexity": scores.of(model, opening, report),
            "plot": str(picture) if picture else None,
        }
    if picture:
        drawing.draw_bench(found, picture)
    return {**found, "seconds": round(time.monotonic() - started, 3)}


def _wanted(values: str, seconds: float, plot: Path | None, spec: Any) -> Any:
    """The perplexities asked for, once everything else is in range."""
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {shown(values)}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be a number above 0, got {shown(seconds)}")
    if plot is not None:
        drawing.check_picture(plot)
    return spec


def machine() -> dict[str, Any]:
    """This machine: its processor, what computes with packed weights, and how busy it is."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "busy": share_at_work(),
        "cache_bytes": cache_bytes(),
        "kernels": library.status(),
        "native": library.available(),
        "gpu": devices.choose_device().type != "cpu",
    }


def _check_room(model: Model) -> None:
    """Raise `ValueError` where a second form of a model finds no room on disk, or one no room in memory."""
    needed = sum(tensor.bytes for tensor in model.source.tensors.values())
    folder, free = tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise ValueError(
            f"bench writes up to {size_text(needed)} to {folder}, which has {size_text(free)} free; set "
            "TMPDIR to a folder with more room, or use --products-only"
        )
    memory = devices.available_memory()
    if memory < needed + PROCESS:
        raise ValueError(
            f"the dense model needs about {size_text(needed + PROCESS)} of memory, and {size_text(memory)} "
            "are free; --products-only needs less"
        )


def _products(matrices: Matrices, seconds: float, reporter: RunReporter) -> dict[str, Any]:
    """The entry `products`."""
    enough = Enough(2 * cache_bytes(), devices.available_memory() // 4, max(5.0, seconds / 2))
    reporter.stage("reading matrices", 1)
    pairs = matrices.some(matrices.groups, enough)
    counts = {size: len(matrices.groups[size]) for size in pairs}
    reporter.step()
    reporter.stage("products", len(TOKENS))
    found = {}
    for tokens in TOKENS if pairs else ():
        found[tokens] = products(pairs, counts, tokens, seconds / len(TOKENS))
        reporter.step()
    touched = zip(*(pair.bytes for some in pairs.values() for pair in some), strict=True)
    return {
        "shapes": [
            {
                "shape": list(size),
                "count": counts[size],
                "measured": len(pairs[size]),
                "tokens": {str(n): entry["shapes"][size] for n, entry in found.items()},
            }
            for size in pairs
        ],
        "all": {str(n): entry["all"] for n, entry in found.items()},
        "rounds": {str(n): entry["rounds"] for n, entry in found.items()},
        "bytes": dict(zip(CONTESTANTS, map(sum, touched), strict=False)),
    }


@contextlib.contextmanager
def _forms(path: Any, model: Model, values: str, reporter: RunReporter) -> Iterator[dict[str, Path]]:
    """The folders of the dense and of the packed form; the one that is not there lasts for the `with`."""
    assert model.folder is not None
    there, other = CONTESTANTS[::-1] if isinstance(model.source, Packed) else CONTESTANTS
    with tempfile.TemporaryDirectory(prefix="llmprune-bench-") as folder:
        made = Path(folder) / other
        options = model.options
        convert(
            path,
            to=other,
            output=made,
            values=values,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            blocks=options.blocks,
            reporter=reporter,
        )
        yield {there: model.folder, other: made}


def _sizes(matrices: Matrices, forms: Mapping[str, Path] | None, model: Model) -> dict[str, int]:
    """The entry `bytes`: of the weight files; without both forms, of their tensors."""
    if forms:
        files = {who: [forms[who] / name for name in Checkpoint(forms[who]).files] for who in CONTESTANTS}
        return {who: sum(path.stat().st_size for path in found) for who, found in files.items()}
    return {"dense": sum(t.bytes for t in model.source.tensors.values()), "packed": matrices.packed_bytes()}
