"""The Python function `convert`: a checkpoint in another format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import reporting
from llmprune.checkpoint.bitmask import BITS, FORMATS, WEIGHT, Bitmasked
from llmprune.checkpoint.contents import CONFIG, INDEX
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import read_json
from llmprune.checkpoint.replacement import MODEL, input_files
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.common.messages import shown
from llmprune.contracts import VALUES
from llmprune.machine import processes
from llmprune.model.opening import OpenOptions, open_model
from llmprune.run.production import close
from llmprune.run.repacking import Conversion
from llmprune.run.reporter import RunReporter

BITMASK = FORMATS[0]
TARGETS = ("dense", "packed", BITMASK)


@checked()
def convert(
    path: AnyPath,
    *,
    to: str,
    output: AnyPath,
    values: str = "same",
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another format, block by block, and but for `values` without any loss.

    A conversion that broke off goes on with `resume`.

    Args:
        path: `demo`, an alias, a hub id or a folder: dense, packed, or in one of the formats sparse-bitmask
            and sparse-24-bitmask of compressed-tensors; of llmprune or not.
        to: `packed` (of each sparse matrix the kept values and a bit per weight; a matrix that would not
            become smaller stays as it is), `dense` (what every program loads) or `sparse-bitmask` (what
            compressed-tensors up to 0.14 reads; -0.0 becomes 0.0 in it, and a note says how often).
        output: the folder to write.
        values: how kept values are packed: `same` (as they are), or rounded to `int8` or `int4` with a scale
            for every 128 columns of a row.
        overwrite: replace an output of llmprune in that folder, once the new one is complete.
        resume: continue where an earlier conversion into this folder stopped.
        restart: throw away what an unfinished one left in this folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A dict with `output`, `format`, `bytes` (`dense` and `written`), `matrices` (how many are packed),
        `dense` (the names of those that are not) and `seconds`.

    Raises:
        ValueError: bad input, before any long work; one line says what was received and what to do.
    """
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {shown(to)}")
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {shown(values)}")
    if to != "packed" and values != "same":
        raise ValueError(f"values {values} are for packed folders; leave them out with --to {to}")
    how = OpenOptions(
        device="cpu", revision=revision, trust_remote_code=trust_remote_code, blocks=blocks, dtype="float32"
    )
    opened, started = open_model(path, how), time.monotonic()
    _check_other(opened.source, path, to, values)
    inputs = input_files([(MODEL, opened.folder)])
    target = Path(output).expanduser()
    writer = CheckpointWriter(target, overwrite=overwrite, resume=resume, restart=restart, inputs=inputs)
    count = len(opened.skeleton.blocks)
    try:
        with reporting(reporter, progress, processes.ALONE) as report:
            record = Conversion(opened, to, values, trust_remote_code).write(writer, report)
        writer.complete()
    except BaseException as error:
        close(writer, error, target, count, "written")
        raise
    close(writer, None, target, count, "written")
    return _conversion(target, to, record, time.monotonic() - started)


def _check_other(source: Any, path: AnyPath, to: str, values: str) -> None:
    """Raise `ValueError` where a checkpoint is in the wanted format already."""
    if to == "dense" and not isinstance(source, (Packed, Bitmasked)):
        raise ValueError(f"{path} is dense already")
    if to == "packed" and isinstance(source, Packed) and values == source.values:
        raise ValueError(f"{path} is packed with these values already")
    if to == BITMASK and isinstance(source, Bitmasked):
        raise ValueError(f"{path} is in {' or '.join(FORMATS)} already; make it dense first (--to dense)")


def _conversion(output: Path, to: str, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `convert` returns of the folder it has written."""
    entry = packing_entry(read_json(output / CONFIG)) or {"matrices": {}}
    names = {row["name"] for row in record["matrices"]}
    stacks = entry.get("stacks", {})
    packed = {n for n in names if n in entry["matrices"] or n.rpartition(".")[0] in stacks}
    if to == BITMASK:
        written = read_json(output / INDEX)["weight_map"]
        packed = {name for name in names if name.removesuffix(WEIGHT) + BITS in written}
    return {
        "output": str(output),
        "format": to,
        "bytes": {key: record["totals"]["bytes"][key] for key in ("dense", "written")},
        "matrices": len(packed),
        "dense": sorted(names - packed),
        "seconds": round(seconds, 3),
    }
